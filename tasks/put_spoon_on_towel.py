"""Put the spoon on the towel.

Source: SIMPLER (Li et al., CoRL 2024), PutSpoonOnTableClothInScene.
"""

import math

from tasks.layout import at_rest, ordered_pairs, square_corners
from tasks.reward import reward_terms
from tasks.success import lost, source_on_target
from tasks.task import InitialState, SceneObject, Task, TaskState

SPOON = SceneObject("spoon", (0.14, 0.0346, 0.026), 1200.0, (0.05, 0.2, 0.95))
TOWEL = SceneObject("towel", (0.1, 0.1, 0.01), 300.0, (0.9, 0.1, 0.5))

CENTER = (0.307, 0.028)


def success(state: TaskState) -> bool:
    """The spoon is on the towel."""
    return source_on_target(state, SPOON, TOWEL)


def failure(state: TaskState) -> bool:
    """The spoon or the towel has left the workspace."""
    return lost(state, (SPOON.name, TOWEL.name))


def terms(state: TaskState) -> dict[str, float]:
    """Reward terms; see `tasks.reward.reward_terms`."""
    return reward_terms(state, source=SPOON.name, target=TOWEL.name, success=success(state))


def _initial_states() -> tuple[InitialState, ...]:
    return tuple(
        {SPOON.name: at_rest(SPOON, source_xy, yaw), TOWEL.name: at_rest(TOWEL, target_xy)}
        for yaw in (math.pi, -math.pi / 2)
        for source_xy, target_xy in ordered_pairs(square_corners(CENTER, 0.075))
    )


PUT_SPOON_ON_TOWEL = Task(
    name="put_spoon_on_towel",
    instruction="put the spoon on the towel",
    scene="table",
    objects=(SPOON, TOWEL),
    source=SPOON.name,
    target=TOWEL.name,
    initial_states=_initial_states(),
    max_episode_steps=60,
    success=success,
    failure=failure,
    reward_terms=terms,
)
