"""Train Stable-Baselines3's PPO in a batched env, in parts that a killed run repeats to the bit."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policies.run_state import seed_of
from policies.sb3_policy import INSTALL
from wfm_core.checkpoint import write_config
from wfm_core.data.files import write_atomic
from wfm_core.train import require_same_settings

MODEL = "model.zip"


@dataclass
class SB3TrainConfig:
    """One training by PPO; names and meanings are SB3's.

    Attributes:
        num_steps: control steps of all rows together.
        n_steps: of each row between updates.
        updates_per_part: what a run that was killed may have to repeat; rows begin anew after it.
        log_std_init: of the actions.
        net_arch: widths of actor and critic, which share nothing.
    """

    num_steps: int = 200_000
    n_steps: int = 32
    batch_size: int = 512
    n_epochs: int = 5
    gamma: float = 0.98
    gae_lambda: float = 0.95
    learning_rate: float = 3e-4
    ent_coef: float = 0.0
    log_std_init: float = -1.0
    net_arch: list[int] = field(default_factory=lambda: [256, 256])
    updates_per_part: int = 8
    seed: int = 0


def train_sb3(
    env: Any,
    config: SB3TrainConfig,
    out_dir: Path,
    *,
    made_of: dict[str, object],
    world_model: str,
    on_part: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train a policy on "latents" and "agent_pos", and write its folder; resumes if killed.

    Args:
        env: an SB3 `VecEnv`.
        config: settings.
        out_dir: the policy's folder; its state lies next to it in `<out_dir>.run`.
        made_of: what the env is made of, as JSON values; it must be the run's own.
        world_model: that of the latents; the policy encodes pixels with it where there are no latents.
        on_part: called with the steps made and what there is to tell.

    Returns:
        The last part's success rate and mean return.

    Raises:
        ValueError: what lies in the run's folder is of another run.
        ImportError: stable-baselines3 is not installed.
    """
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.utils import set_random_seed
        from stable_baselines3.common.vec_env import VecMonitor
    except ImportError as error:
        raise ImportError(f"recipe=sb3 needs stable-baselines3: {INSTALL}") from error
    run_dir = out_dir.with_name(out_dir.name + ".run")
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(config) | made_of))
    del settings["num_steps"]  # a run may be made longer
    done, told = _resume(run_dir / "state.json", settings)
    monitored = VecMonitor(env)
    if done:
        model = PPO.load(run_dir / f"{done}.zip", monitored, device="cpu")
    else:
        model = PPO(
            "MultiInputPolicy", monitored, n_steps=config.n_steps, batch_size=config.batch_size,
            n_epochs=config.n_epochs, gamma=config.gamma, gae_lambda=config.gae_lambda,
            learning_rate=config.learning_rate, ent_coef=config.ent_coef, seed=config.seed, device="cpu",
            policy_kwargs={"net_arch": list(config.net_arch), "log_std_init": config.log_std_init},
        )  # fmt: skip
    part_steps = config.updates_per_part * config.n_steps * env.num_envs
    while done < config.num_steps:
        seed = seed_of(config.seed, done) % 2**31
        set_random_seed(seed)
        monitored.seed(seed)
        model.set_env(monitored, force_reset=True)
        model.learn(part_steps, reset_num_timesteps=done == 0)
        if not all(torch.isfinite(value).all() for value in model.policy.state_dict().values()):
            raise FloatingPointError(f"weights are not finite any more; the last good ones are in {run_dir}/{done}.zip")
        before, done = done, done + part_steps
        told = {
            "success": float(np.mean(model.ep_success_buffer or [np.nan])),
            "episode_return": float(np.mean([each["r"] for each in model.ep_info_buffer or []] or [np.nan])),
        }
        model.save(run_dir / f"{done}.zip")
        state = {"steps": done, "told": told, "settings": settings}
        write_atomic(run_dir / "state.json", (json.dumps(state) + "\n").encode())
        (run_dir / f"{before}.zip").unlink(missing_ok=True)
        if on_part is not None:
            on_part(done, told)
    write_atomic(out_dir / MODEL, (run_dir / f"{done}.zip").read_bytes())
    write_config(out_dir, {"kind": "sb3", "file": MODEL, "algorithm": "PPO", "world_model": world_model})
    return told


def _resume(path: Path, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Steps made so far, and what the last part told."""
    if not path.exists():
        return 0, {}
    state = json.loads(path.read_text())
    require_same_settings(path, state["settings"], settings)
    return state["steps"], state["told"]
