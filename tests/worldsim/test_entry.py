"""One line for what the user can mend, a traceback for what is our fault."""

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from worldsim.commands.entry import launch, script


@dataclass
class Settings:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must be >= 0, got {self.size}")


def test_the_command_gets_its_dataclass():
    seen: list[Settings] = []
    launch("demo", OmegaConf.structured(Settings(size=3)), Settings, seen.append)
    assert seen == [Settings(size=3)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("size is wrong"), "worldsim-train-policy: size is wrong"),
        (OSError(28, "No space left on device", "a.npy"), "the same command goes on from there"),
        (ImportError("install worldsim[twin]"), "install worldsim[twin]"),
        (FloatingPointError("loss is nan"), "loss is nan"),
        (KeyboardInterrupt(), "interrupted"),
        (MissingMandatoryValue("data is missing"), "data is missing"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error: BaseException, said: str):
    def run(settings: Settings) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        launch("train_policy", OmegaConf.structured(Settings), Settings, run)
    assert said in str(stop.value)
    assert len(str(stop.value).strip().splitlines()) == 1


def test_our_own_faults_keep_their_traceback():
    def run(settings: Settings) -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        launch("demo", OmegaConf.structured(Settings), Settings, run)


def test_a_script_is_named_as_it_is_typed():
    assert script("train_policy") == "worldsim-train-policy"
