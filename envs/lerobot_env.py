"""Both twins as LeRobot envs, for its own commands.

    lerobot-eval --env.discover_packages_path=envs.lerobot_env --env.type=worldmodel_bridge --env.task=push_cube
        --policy.path=path/to/policy --eval.n_episodes=24 --eval.batch_size=24

`--env.type=mujoco_bridge` is the twin. Keys and units are those of the data sets that `worldsim-record` writes, so what
was trained on these runs as it is; and `--eval.recording=true` writes imagined rollouts as such data sets.
"""

import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.vector.utils import batch_space

from envs.spaces import FRAME_SHAPE
from envs.vector import BridgeVectorEnv
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.data.actions import ACTION_DIM, ACTION_HIGH, ACTION_LOW, AGENT_POS_DIM, CONTROL_HZ, to_normalised
from wfm_core.data.lerobot_v3_writer import DEFAULT_CAMERA, IMAGES

try:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.envs.configs import EnvConfig
    from lerobot.utils.constants import ACTION, OBS_STATE
except ImportError as error:
    raise ImportError("envs.lerobot_env needs lerobot: pip install 'worldsim[lerobot]'") from error

__path__: list[str] = []  # LeRobot looks for plug-ins in packages: this is one, and nothing is in it
CAMERA = DEFAULT_CAMERA.removeprefix(IMAGES)


class LeRobotVectorEnv(VectorWrapper):
    """A vector env as LeRobot takes it: pixels by camera, actions in physical units (m, rad, openness)."""

    def __init__(self, env: BridgeVectorEnv) -> None:
        """Wrap an env that observes pixels.

        Raises:
            ValueError: its autoreset mode is not SAME_STEP.
        """
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"env must have autoreset_mode='SameStep', got {env.autoreset_mode.name}")
        super().__init__(env)
        self.call, self.get_attr = env.call, env.get_attr
        space: Any = env.single_observation_space
        pixels = spaces.Dict({CAMERA: space["pixels"]})
        seen = {"pixels": pixels, "agent_pos": space["agent_pos"], OBS_STATE: space["agent_pos"]}
        self.single_observation_space = spaces.Dict(seen)
        self.single_action_space = spaces.Box(ACTION_LOW, ACTION_HIGH, (ACTION_DIM,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin new episodes."""
        obs, info = self.env.reset(seed=seed, options=options)
        return _by_camera(obs), info

    def step(self, actions: np.ndarray) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every row by one control step with (B, 7) physical actions."""
        obs, reward, terminated, truncated, info = self.env.step(to_normalised(np.asarray(actions, np.float32)))
        for row in np.flatnonzero(info.get("_final_obs", ())):
            info["final_obs"][row] = _by_camera(info["final_obs"][row])
        return _by_camera(obs), reward, terminated, truncated, info


def _by_camera(obs: dict[str, np.ndarray]) -> dict[str, Any]:
    # The state comes twice: under the name that LeRobot reads, and under that which it records.
    return {"pixels": {CAMERA: obs["pixels"]}, "agent_pos": obs["agent_pos"], OBS_STATE: obs["agent_pos"]}


def _features() -> dict[str, PolicyFeature]:
    return {
        DEFAULT_CAMERA: PolicyFeature(FeatureType.VISUAL, FRAME_SHAPE),
        OBS_STATE: PolicyFeature(FeatureType.STATE, (AGENT_POS_DIM,)),
        ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,)),
    }


@dataclass
class BridgeConfig(EnvConfig, abc.ABC):
    """What both twins have in common; `task` is a name in `tasks.TASKS`."""

    task: str | None = "put_carrot_on_plate"
    fps: int = CONTROL_HZ
    features: dict[str, PolicyFeature] = field(default_factory=_features)
    features_map: dict[str, str] = field(default_factory=lambda: {name: name for name in _features()})

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """What the env is made with, besides its rows."""
        return {"task": self.task, "autoreset_mode": AutoresetMode.SAME_STEP, "render_mode": "rgb_array"}

    @abc.abstractmethod
    def make(self, n_envs: int) -> BridgeVectorEnv:
        """Make the env."""

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Return {type: {0: env}}; one process steps all rows, whatever `use_async_envs`."""
        return {self.type: {0: LeRobotVectorEnv(self.make(n_envs))}}


@EnvConfig.register_subclass("worldmodel_bridge")
@dataclass
class WorldModelBridgeConfig(BridgeConfig):
    """`WorldModel-Bridge-v0`; `world_model` is a shipped name or a checkpoint folder of 128-pixel frames."""

    world_model: str = DEFAULT_WORLD_MODEL

    def make(self, n_envs: int) -> BridgeVectorEnv:
        """Make the imagined env."""
        from envs.world_model_bridge import WorldModelBridgeVectorEnv

        return WorldModelBridgeVectorEnv(n_envs, self.world_model, **self.gym_kwargs)


@EnvConfig.register_subclass("mujoco_bridge")
@dataclass
class MujocoBridgeConfig(BridgeConfig):
    """`MujocoBridge-v0`."""

    def make(self, n_envs: int) -> BridgeVectorEnv:
        """Make the twin."""
        from envs.mujoco_bridge import MujocoBridgeVectorEnv

        return MujocoBridgeVectorEnv(n_envs, **self.gym_kwargs)
