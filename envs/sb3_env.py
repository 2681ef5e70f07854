"""Either twin as a Stable-Baselines3 `VecEnv`: B rows, one call a step.

    imagined = WorldModelBridgeVectorEnv(64, task="reach_target", observation="latents", autoreset_mode="SameStep")
    PPO("MultiInputPolicy", VecMonitor(SB3VecEnv(imagined))).learn(100_000)

No row is stepped by itself, and no pixel is decoded unless the env observes pixels or somebody renders.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from envs.vector import BridgeVectorEnv, Obs
from wfm_core.data.actions import ACTION_DIM

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise ImportError("envs.sb3_env needs stable-baselines3: pip install 'worldsim[sb3]'") from error


class SB3VecEnv(VecEnv):
    """B rows of a vector env, as SB3 wants them.

    A row that ends restarts in the same step; its last observation is `infos[row]["terminal_observation"]`, and
    `infos[row]["TimeLimit.truncated"]` says whether a value is to be bootstrapped from it. `seed` and `set_options`
    ("initial_state") count for the next `reset`.
    """

    def __init__(self, env: BridgeVectorEnv) -> None:
        """Wrap an env.

        Raises:
            ValueError: its autoreset mode is not SAME_STEP.
        """
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"env must have autoreset_mode='SameStep', got {env.autoreset_mode.name}")
        self.env = env
        self._actions = np.zeros((env.num_envs, ACTION_DIM), np.float32)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Obs:
        """Begin new episodes in all rows."""
        options = {key: [each[key] for each in self._options] for key in self._options[0]}
        obs, info = self.env.reset(seed=self._seeds, options=options)
        self.reset_infos = _by_row(info, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions (B, 7) until `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Obs, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Advance every row: observation, reward (B,) float32, end of episode (B,) bool, B infos."""
        obs, reward, terminated, truncated, info = self.env.step(self._actions)
        infos = _by_row(info, self.num_envs)
        ended = terminated | truncated
        if ended.any():
            finals = _by_row(info["final_info"], self.num_envs)
            for row in np.flatnonzero(ended):
                self.reset_infos[row] = infos[row]
                infos[row] = finals[row] | {"terminal_observation": info["final_obs"][row]}
        for row in range(self.num_envs):
            infos[row]["TimeLimit.truncated"] = bool(truncated[row])
        return obs, reward.astype(np.float32), ended, infos

    def close(self) -> None:
        """Close the env."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the env, once for each index."""
        return [getattr(self.env, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the env, which all rows share.

        Raises:
            ValueError: of some rows only.
        """
        if len(self._rows(indices)) != self.num_envs:
            raise ValueError(f"rows share the env, so indices must be all of {self.num_envs}, got {indices}")
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the env once and return the result for each index."""
        return [getattr(self.env, method_name)(*method_args, **method_kwargs)] * len(self._rows(indices))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """Return False for each index: rows have no wrappers."""
        return [False] * len(self._rows(indices))

    def get_images(self) -> Sequence[np.ndarray]:
        """Return one (H, W, 3) uint8 frame a row."""
        return self.env.render()

    def _rows(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))


def _by_row(info: dict[str, Any], num_rows: int) -> list[dict[str, Any]]:
    """Split Gymnasium's masked info into one dict a row, without the masks and what is told of ends elsewhere."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_rows)]
    for key, value in info.items():
        if key.startswith("_") or key in ("final_obs", "final_info"):
            continue
        for row in np.flatnonzero(info[f"_{key}"]):
            rows[row][key] = value[row].item() if isinstance(value[row], np.generic) else value[row]
    return rows
