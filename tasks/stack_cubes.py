"""Stack the green cube on the yellow cube.

Source: SIMPLER (Li et al., CoRL 2024), StackGreenCubeOnYellowCubeBakedTexInScene.
"""

from tasks.layout import at_rest, ordered_pairs, square_corners
from tasks.reward import reward_terms
from tasks.success import lost, source_on_target
from tasks.task import InitialState, SceneObject, Task, TaskState

GREEN_CUBE = SceneObject("green_cube", (0.03, 0.03, 0.03), 1000.0, (0.05, 0.65, 0.1))
YELLOW_CUBE = SceneObject("yellow_cube", (0.03, 0.03, 0.03), 1000.0, (0.95, 0.8, 0.0))

CENTER = (0.307, 0.028)


def success(state: TaskState) -> bool:
    """The green cube is on the yellow cube and touches nothing else but the robot."""
    return source_on_target(state, GREEN_CUBE, YELLOW_CUBE, only_touching_target=True)


def failure(state: TaskState) -> bool:
    """The green cube or the yellow cube has left the workspace."""
    return lost(state, (GREEN_CUBE.name, YELLOW_CUBE.name))


def terms(state: TaskState) -> dict[str, float]:
    """Reward terms; see `tasks.reward.reward_terms`."""
    return reward_terms(state, source=GREEN_CUBE.name, target=YELLOW_CUBE.name, success=success(state))


def _initial_states() -> tuple[InitialState, ...]:
    return tuple(
        {GREEN_CUBE.name: at_rest(GREEN_CUBE, source_xy), YELLOW_CUBE.name: at_rest(YELLOW_CUBE, target_xy)}
        for half_edge in (0.05, 0.10)
        for source_xy, target_xy in ordered_pairs(square_corners(CENTER, half_edge))
    )


STACK_CUBES = Task(
    name="stack_cubes",
    instruction="stack the green block on the yellow block",
    scene="table",
    objects=(GREEN_CUBE, YELLOW_CUBE),
    source=GREEN_CUBE.name,
    target=YELLOW_CUBE.name,
    initial_states=_initial_states(),
    max_episode_steps=60,
    success=success,
    failure=failure,
    reward_terms=terms,
)
