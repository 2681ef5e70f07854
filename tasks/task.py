"""What a task is: a scene, 24 initial states, an instruction, reward terms and a success test.

Everything is in the robot-base frame (x forward, y left, z up; table top at z = 0), metres and radians. Nothing here
knows a simulator: the twin builds scenes from `SceneObject`s and reports `TaskState`s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

REWARD_TERMS: tuple[str, ...] = ("reach", "grasp", "transport", "success")
"""Names of the reward terms, the same for every task, each in [0, 1]; the env's reward is their weighted sum."""

REWARD_WEIGHTS: dict[str, float] = {"reach": 0.1, "grasp": 0.2, "transport": 0.2, "success": 1.0}

SUCCESS_HOLD_STEPS = 3
"""Control steps (0.6 s) for which the success test must hold in a row before an episode counts as solved."""


def held(flags: np.ndarray, steps: int = SUCCESS_HOLD_STEPS) -> bool:
    """Whether a (T,) bool test holds for `steps` frames in a row somewhere."""
    return bool(np.convolve(flags, np.ones(steps), "valid").max() >= steps) if len(flags) >= steps else False


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    `size` is the full extent of its bounding box at yaw 0 (m), `density` in kg/m^3, `color` linear RGB in [0, 1].
    A `fixed` object is welded to the world; a `ghost` has no collision (a marker).
    """

    name: str
    size: tuple[float, float, float]
    density: float
    color: tuple[float, float, float]
    fixed: bool = False
    ghost: bool = False


@dataclass(frozen=True)
class Pose:
    """Position of an object's bounding-box centre (m) and its yaw (rad), robot-base frame."""

    x: float
    y: float
    z: float
    yaw: float = 0.0


InitialState = Mapping[str, Pose]
"""Object name -> pose at reset."""


@dataclass(frozen=True)
class TaskState:
    """Ground truth of one moment, robot-base frame.

    Attributes:
        ee_pos: (3,) float64, end-effector position, m.
        gripper: openness in [0, 1], 1 = open.
        positions: object name -> (3,) float64, bounding-box centre, m.
        quats: object name -> (4,) float64, orientation w, x, y, z.
        initial_positions: `positions` at reset.
        grasped: name of the object held between both fingers, or None.
        source_contacts: what the source object touches other than robot links: object names, or "table".
    """

    ee_pos: np.ndarray
    gripper: float
    positions: Mapping[str, np.ndarray]
    quats: Mapping[str, np.ndarray]
    initial_positions: Mapping[str, np.ndarray]
    grasped: str | None
    source_contacts: frozenset[str]


@dataclass(frozen=True)
class Task:
    """A task. `source` is the object to act on (or None), `target` where it shall go (or the point to reach)."""

    name: str
    instruction: str
    scene: Literal["table", "sink"]
    objects: tuple[SceneObject, ...]
    source: str | None
    target: str
    initial_states: tuple[InitialState, ...]
    max_episode_steps: int
    success: Callable[[TaskState], bool]
    failure: Callable[[TaskState], bool]
    reward_terms: Callable[[TaskState], dict[str, float]]
