"""Reward terms: pure functions of `TaskState`, each in [0, 1]."""

import numpy as np

from tasks.task import TaskState

DISTANCE_SCALE = 5.0
"""1/m; a shaped term falls from 1 at contact to 0.54 at 10 cm and 0.24 at 20 cm."""


def nearness(distance: float) -> float:
    """Map a distance >= 0 (m) to (0, 1], 1 at zero."""
    return float(1.0 - np.tanh(DISTANCE_SCALE * distance))


def reward_terms(state: TaskState, *, source: str | None, target: str, success: bool) -> dict[str, float]:
    """Return the value of every term of `tasks.task.REWARD_TERMS`.

    Args:
        state: the moment to judge.
        source: the object to act on; None where the end effector itself shall go to the target.
        target: where the source shall go.
        success: the task's success test on the same state.

    Returns:
        reach: nearness of the end effector to the source (without a source: to the target).
        grasp: 1 while the source is held between both fingers, else 0 (0 without a source).
        transport: nearness of source and target in the horizontal plane (0 without a source).
        success: 1 where the success test holds, else 0.
    """
    goal = state.positions[source if source is not None else target]
    terms = {"reach": nearness(float(np.linalg.norm(state.ee_pos - goal))), "grasp": 0.0, "transport": 0.0}
    if source is not None:
        terms["grasp"] = float(state.grasped == source)
        terms["transport"] = nearness(float(np.linalg.norm((goal - state.positions[target])[:2])))
    terms["success"] = float(success)
    return terms
