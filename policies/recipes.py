"""The policies that ship, each as the settings that train it, and the one function that trains from settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from policies.inverse_train import InverseTrainConfig, train_inverse_dynamics
from policies.lerobot_train import ACTTrainConfig, LeRobotTrainConfig, train_lerobot
from policies.train import BCTrainConfig, CloneConfig, clone
from wfm_core.checkpoint import write_config
from wfm_core.data.files import write_atomic


@dataclass
class ScriptedConfig:
    """A scripted policy: nothing to train. `noise` from 0 (as good as it gets) to 1 (hardly ever succeeds)."""

    noise: float = 0.0


Recipe = CloneConfig | LeRobotTrainConfig | InverseTrainConfig | ScriptedConfig

SHIPPED: dict[str, Recipe] = {
    "bc_all_demos": BCTrainConfig(num_steps=3000),
    "bc_30_demos": BCTrainConfig(num_demos=30, num_steps=1200),
    "bc_100_demos": BCTrainConfig(num_demos=100, num_steps=2000),
    "bc_10_demos": BCTrainConfig(num_demos=10, num_steps=1000),
    "bc_1000_steps": BCTrainConfig(num_steps=1000),
    "bc_300_steps": BCTrainConfig(num_steps=300),
    "act_30_demos": ACTTrainConfig(encoder="bc_all_demos", num_demos=30, num_steps=2000),
    "scripted": ScriptedConfig(noise=0.0),
    "scripted_noise_40": ScriptedConfig(noise=0.4),
    "scripted_noise_80": ScriptedConfig(noise=0.8),
}
"""Name -> settings, in an order in which a policy comes after those it needs."""


def train_policy(
    recipe: Recipe,
    cache_dirs: Sequence[str],
    out_dir: Path,
    *,
    command: str = "",
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train one policy, or inverse dynamics, and write its folder.

    Args:
        recipe: its settings.
        cache_dirs: the clip caches to learn from.
        out_dir: the policy's folder.
        command: the command line, for the card.
        on_log: called now and then with the step and its metrics; LeRobot's trainer writes its own log instead.

    Returns:
        Errors on held-out data; empty for a scripted policy.

    Raises:
        ValueError: see `clone`, `train_lerobot` and `train_inverse_dynamics`.
    """
    if isinstance(recipe, CloneConfig):
        return clone(cache_dirs, out_dir, recipe, command=command, on_log=on_log)
    if isinstance(recipe, LeRobotTrainConfig):
        return train_lerobot(cache_dirs, out_dir, recipe, command=command)
    if isinstance(recipe, InverseTrainConfig):
        return train_inverse_dynamics(cache_dirs, out_dir, recipe, command=command, on_log=on_log)
    write_scripted(out_dir, recipe, command=command)
    return {}


def write_scripted(out_dir: Path, config: ScriptedConfig, *, command: str = "") -> None:
    """Write the folder of a scripted policy: a configuration and a card."""
    write_config(out_dir, {"kind": "scripted", "noise": config.noise})
    card = (
        f"# {out_dir.name}\n\n"
        "A scripted policy that finds objects by colour in the frame; see `policies/scripted_vision.py`.\n\n"
        f"- Noise: {config.noise}.\n"
        f"- Command: `{command or 'policies.recipes.write_scripted'}`\n"
        "- Limits: knows the six tasks' objects, colours and camera; not for scenes with factors of variation.\n"
    )
    write_atomic(out_dir / "CARD.md", card.encode())
