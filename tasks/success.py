"""Success and failure tests: pure functions of `TaskState`, given a task's fixed sizes."""

from collections.abc import Sequence

import numpy as np

from tasks.task import SceneObject, TaskState

WORKSPACE_LOW = np.array([0.05, -0.32, -0.03])
WORKSPACE_HIGH = np.array([0.52, 0.34, 0.45])
"""A movable object whose centre leaves this box (m, robot-base frame) is lost: off the table or out of reach."""


def source_on_target(
    state: TaskState,
    source: SceneObject,
    target: SceneObject,
    *,
    max_gap: float = 0.02,
    only_touching_target: bool = False,
) -> bool:
    """Tell whether the source is on the target, as SIMPLER's Bridge tasks define it (release is not required).

    Args:
        state: the moment to judge.
        source: the object that was to be moved.
        target: the object it shall be on.
        max_gap: largest vertical gap between source and target, m, before tolerance for tilt.
        only_touching_target: also require that the source touches nothing but the target and the robot.

    Source: SIMPLER (Li et al., CoRL 2024), PutOnInScene evaluation.
    """
    offset = state.positions[source.name] - state.positions[target.name]
    half_heights = (source.size[2] + target.size[2]) / 2
    on_target = (
        np.linalg.norm(offset[:2]) <= np.linalg.norm(target.size[:2]) / 2 + 0.003
        and offset[2] > 0
        and offset[2] - half_heights <= max_gap
    )
    return bool(on_target and (not only_touching_target or state.source_contacts <= {target.name}))


def ee_at(state: TaskState, target: str, tolerance: float) -> bool:
    """Tell whether the end effector is within `tolerance` (m) of the target's centre."""
    return bool(np.linalg.norm(state.ee_pos - state.positions[target]) <= tolerance)


def source_over_disc(state: TaskState, source: SceneObject, disc: SceneObject) -> bool:
    """Tell whether the source's centre is over the disc while it rests on the table (lifted by less than 1 cm)."""
    position = state.positions[source.name]
    distance = np.linalg.norm((position - state.positions[disc.name])[:2])
    return bool(distance <= disc.size[0] / 2 and position[2] <= source.size[2] / 2 + 0.01)


def lost(state: TaskState, movable: Sequence[str]) -> bool:
    """Tell whether the centre of any of the `movable` objects has left the workspace."""
    centres = np.array([state.positions[name] for name in movable]).reshape(-1, 3)
    return bool(np.any((centres < WORKSPACE_LOW) | (centres > WORKSPACE_HIGH)))
