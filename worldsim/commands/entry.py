"""What every console script shares: its help page, and one line instead of a traceback when the user can mend it."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

if TYPE_CHECKING:  # torch is slow to load, and not every command needs it
    from wfm_core.train import OnLog


def register(name: str, settings: type, doc: str | None) -> None:
    """Store a command's settings and its `--help` page under the names that its YAML file refers to.

    Args:
        name: of the command, without "worldsim-"; dashes as underscores.
        settings: the dataclass of its settings.
        doc: its module's docstring.
    """
    store = ConfigStore.instance()
    store.store(name=f"{name}_defaults", node=settings)
    page = {"app_name": script(name), "header": "", "footer": "", "template": f"{doc}\nSettings:\n\n$CONFIG"}
    store.store(group="hydra/help", name=name, node=page)


def launch[Settings](name: str, config: Any, settings: type[Settings], run: Callable[[Settings], object]) -> None:
    """Turn a hydra configuration into its dataclass and run the command; every command goes on where it stopped.

    Raises:
        SystemExit: bad input, a missing library, a full disk, or Ctrl-C; one line says which, and what is kept.
    """
    try:
        values = OmegaConf.to_object(config)
        assert isinstance(values, settings)
        run(values)
    except OSError as error:
        sys.exit(f"{script(name)}: {error}. What is finished is kept; the same command goes on from there")
    except (ValueError, ImportError, RuntimeError, FloatingPointError, OmegaConfBaseException) as error:
        sys.exit(f"{script(name)}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{script(name)}: interrupted; what is finished is kept, and the same command goes on from there")


def training_bar(num_steps: int, name: str, *, disable: bool = False) -> "tuple[tqdm, OnLog]":
    """A progress bar, and what to give `wfm_core.train.fit` as `on_log` to move it."""
    bar = tqdm(total=num_steps, desc=name, disable=disable)

    def show(step: int, row: dict[str, float]) -> None:
        bar.update(step - bar.n)
        bar.set_postfix({name: f"{value:.4g}" for name, value in row.items()})

    return bar, show


def script(name: str) -> str:
    """Name of the console script, as the user types it."""
    return "worldsim-" + name.replace("_", "-")
