"""Reach a floating red marker with the gripper."""

from tasks.reward import reward_terms
from tasks.success import ee_at
from tasks.task import InitialState, Pose, SceneObject, Task, TaskState

TOLERANCE = 0.025  # m

MARKER = SceneObject("marker", (0.03, 0.03, 0.03), 1000.0, (0.95, 0.08, 0.08), fixed=True, ghost=True)


def success(state: TaskState) -> bool:
    """The end effector is within 2.5 cm of the marker's centre."""
    return ee_at(state, MARKER.name, TOLERANCE)


def failure(state: TaskState) -> bool:
    """Nothing can be lost here."""
    return False


def terms(state: TaskState) -> dict[str, float]:
    """Reward terms; see `tasks.reward.reward_terms`."""
    return reward_terms(state, source=None, target=MARKER.name, success=success(state))


def _initial_states() -> tuple[InitialState, ...]:
    return tuple(
        {MARKER.name: Pose(x, y, z)}
        for x in (0.21, 0.26, 0.33, 0.38)
        for y in (-0.07, 0.03, 0.12)
        for z in (0.05, 0.15)
    )


REACH_TARGET = Task(
    name="reach_target",
    instruction="reach the red marker",
    scene="table",
    objects=(MARKER,),
    source=None,
    target=MARKER.name,
    initial_states=_initial_states(),
    max_episode_steps=40,
    success=success,
    failure=failure,
    reward_terms=terms,
)
