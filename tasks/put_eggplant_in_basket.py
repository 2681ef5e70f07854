"""Put the eggplant into the yellow basket, both in a sink whose floor is z = 0.

The source's target is an invisible plane over a basket of the background picture; here the basket is an open box of the
same footprint, with a raised floor so that only an eggplant inside it lies higher than the basket's centre.

Source: SIMPLER (Li et al., CoRL 2024), PutEggplantInBasketScene.
"""

import math

from tasks.layout import at_rest
from tasks.reward import reward_terms
from tasks.success import lost, source_on_target
from tasks.task import InitialState, SceneObject, Task, TaskState

EGGPLANT = SceneObject("eggplant", (0.078, 0.037, 0.038), 400.0, (0.35, 0.05, 0.6))
BASKET = SceneObject("basket", (0.13, 0.08, 0.045), 500.0, (0.95, 0.8, 0.0), fixed=True)

BASKET_FLOOR_HEIGHT = 0.015  # m, top of the raised floor
BASKET_WALL = 0.004  # m, thickness
SINK_CENTER = (0.287, -0.07)
SINK_SIZE = (0.269, 0.393, 0.065)
"""Inner extent of the sink, m: x, y, and the height of its rim above the floor (lower than the published 0.115, so that
the camera sees the whole eggplant in every initial state)."""

EGGPLANT_CENTER = (0.232, -0.146)
EGGPLANT_HALF_SPAN = (0.01, 0.015)
BASKET_XY = (0.252, 0.035)


def success(state: TaskState) -> bool:
    """The eggplant is in the basket."""
    return source_on_target(state, EGGPLANT, BASKET, max_gap=0.06)


def failure(state: TaskState) -> bool:
    """The eggplant has left the workspace."""
    return lost(state, (EGGPLANT.name,))


def terms(state: TaskState) -> dict[str, float]:
    """Reward terms; see `tasks.reward.reward_terms`."""
    return reward_terms(state, source=EGGPLANT.name, target=BASKET.name, success=success(state))


def _initial_states() -> tuple[InitialState, ...]:
    basket = at_rest(BASKET, BASKET_XY)
    return tuple(
        {
            EGGPLANT.name: at_rest(
                EGGPLANT,
                (
                    EGGPLANT_CENTER[0] + column * EGGPLANT_HALF_SPAN[0],
                    EGGPLANT_CENTER[1] + row * EGGPLANT_HALF_SPAN[1],
                ),
                yaw,
            ),
            BASKET.name: basket,
        }
        for yaw in (0.0, math.pi / 4, -math.pi / 4)
        for column in (-1, 1)
        for row in (-1, -1 / 3, 1 / 3, 1)
    )


PUT_EGGPLANT_IN_BASKET = Task(
    name="put_eggplant_in_basket",
    instruction="put the eggplant into the yellow basket",
    scene="sink",
    objects=(EGGPLANT, BASKET),
    source=EGGPLANT.name,
    target=BASKET.name,
    initial_states=_initial_states(),
    max_episode_steps=120,
    success=success,
    failure=failure,
    reward_terms=terms,
)
