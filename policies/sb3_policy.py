"""Stable-Baselines3 policies as ours."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policies.latents import LatentView
from worldsim.protocols import Obs, Policy

INSTALL = "pip install 'worldsim[sb3]'"

ALGORITHM_MARKS = (("n_epochs", "PPO"), ("target_entropy", "SAC"), ("policy_delay", "TD3"), ("gae_lambda", "A2C"))
"""(attribute, algorithm): the first attribute that a file has tells its algorithm, which the file does not name."""


class SB3Policy:
    """Runs the deterministic action of an SB3 model; the model keeps no state, so `reset` only counts rows.

    Args:
        model: a loaded algorithm, trained on our env: dict observations, or one of their entries (a Box).
        view: gives the latents, for a model that was trained on these.
    """

    def __init__(self, model: Any, view: LatentView | None = None) -> None:
        self.model = model
        self._keys = _observed_keys(model.observation_space)
        self._view = view

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`.

        Raises:
            ValueError: `seeds` does not have `num_envs` entries.
        """
        if len(seeds) != num_envs:
            raise ValueError(f"reset needs one seed a row ({num_envs}), got {len(seeds)}")

    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1]."""
        if self._view is not None:
            obs = {**obs, "latents": self._view.of(obs).numpy()}
        observed = obs[self._keys] if isinstance(self._keys, str) else {key: obs[key] for key in self._keys}
        action, _ = self.model.predict(observed, deterministic=True)
        return np.clip(action, -1, 1).astype(np.float32)


def load_sb3(path: Path, algorithm: str | None = None, world_model: str | None = None) -> Policy:
    """Load a model saved by SB3.

    Args:
        path: the .zip file. It holds pickled objects: only load files you trust.
        algorithm: its class, such as "PPO"; None finds out from the file.
        world_model: that whose latents it was trained on; None: it was trained on none.

    Raises:
        ValueError: the file is missing or damaged, or the algorithm is none of A2C, DDPG, PPO, SAC and TD3.
        ImportError: stable-baselines3 is not installed.
    """
    try:
        import stable_baselines3
    except ImportError as error:
        raise ImportError(f"{path} needs stable-baselines3: {INSTALL}") from error
    classes = {name: getattr(stable_baselines3, name) for name in ("A2C", "DDPG", "PPO", "SAC", "TD3")}
    try:
        with zipfile.ZipFile(path) as archive:
            saved = json.loads(archive.read("data"))
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a model saved by Stable-Baselines3: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} fails its checksum")
    name = algorithm or next((name for mark, name in ALGORITHM_MARKS if mark in saved), None)
    if name not in classes:
        raise ValueError(f"{path}: the algorithm must be one of {sorted(classes)}, got {name!r}")
    return SB3Policy(classes[name].load(path, device="cpu"), LatentView(world_model) if world_model else None)


def _observed_keys(space: Any) -> str | list[str]:
    """Return the entries of our observations that a model was trained on: a list for a dict space, one for a box."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return list(space.spaces)
    return "pixels" if len(space.shape) == 3 else "agent_pos"
