"""Put the carrot on the plate.

Source: SIMPLER (Li et al., CoRL 2024), PutCarrotOnPlateInScene.
"""

import math

from tasks.layout import at_rest, ordered_pairs, square_corners
from tasks.reward import reward_terms
from tasks.success import lost, source_on_target
from tasks.task import InitialState, SceneObject, Task, TaskState

CARROT = SceneObject("carrot", (0.115, 0.032, 0.038), 700.0, (1.0, 0.35, 0.0))
PLATE = SceneObject("plate", (0.11, 0.11, 0.006), 2000.0, (0.1, 0.3, 0.95))

CENTER = (0.307, 0.028)


def success(state: TaskState) -> bool:
    """The carrot is on the plate and touches nothing else but the robot."""
    return source_on_target(state, CARROT, PLATE, only_touching_target=True)


def failure(state: TaskState) -> bool:
    """The carrot or the plate has left the workspace."""
    return lost(state, (CARROT.name, PLATE.name))


def terms(state: TaskState) -> dict[str, float]:
    """Reward terms; see `tasks.reward.reward_terms`."""
    return reward_terms(state, source=CARROT.name, target=PLATE.name, success=success(state))


def _initial_states() -> tuple[InitialState, ...]:
    return tuple(
        {CARROT.name: at_rest(CARROT, source_xy, yaw), PLATE.name: at_rest(PLATE, target_xy)}
        for yaw in (0.0, math.pi / 2)
        for source_xy, target_xy in ordered_pairs(square_corners(CENTER, 0.075))
    )


PUT_CARROT_ON_PLATE = Task(
    name="put_carrot_on_plate",
    instruction="put the carrot on the plate",
    scene="table",
    objects=(CARROT, PLATE),
    source=CARROT.name,
    target=PLATE.name,
    initial_states=_initial_states(),
    max_episode_steps=60,
    success=success,
    failure=failure,
    reward_terms=terms,
)
