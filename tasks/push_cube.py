"""Push a red cube into a flat disc."""

from tasks.layout import at_rest, ordered_pairs, square_corners
from tasks.reward import reward_terms
from tasks.success import lost, source_over_disc
from tasks.task import InitialState, SceneObject, Task, TaskState

CUBE = SceneObject("red_cube", (0.04, 0.04, 0.04), 500.0, (0.9, 0.06, 0.06))
DISC = SceneObject("disc", (0.10, 0.10, 0.002), 1000.0, (0.0, 0.75, 0.8), fixed=True, ghost=True)

CENTER = (0.30, 0.03)


def success(state: TaskState) -> bool:
    """The cube's centre is over the disc and the cube is on the table."""
    return source_over_disc(state, CUBE, DISC)


def failure(state: TaskState) -> bool:
    """The cube has left the workspace."""
    return lost(state, (CUBE.name,))


def terms(state: TaskState) -> dict[str, float]:
    """Reward terms; see `tasks.reward.reward_terms`."""
    return reward_terms(state, source=CUBE.name, target=DISC.name, success=success(state))


def _initial_states() -> tuple[InitialState, ...]:
    corners = square_corners(CENTER, 0.06)
    midpoints = [(CENTER[0] + dx, CENTER[1] + dy) for dx, dy in ((-0.09, 0), (0, -0.09), (0, 0.09), (0.09, 0))]
    return tuple(
        {CUBE.name: at_rest(CUBE, cube_xy), DISC.name: at_rest(DISC, disc_xy)}
        for points in (corners, midpoints)
        for cube_xy, disc_xy in ordered_pairs(points)
    )


PUSH_CUBE = Task(
    name="push_cube",
    instruction="push the red cube into the cyan disc",
    scene="table",
    objects=(CUBE, DISC),
    source=CUBE.name,
    target=DISC.name,
    initial_states=_initial_states(),
    max_episode_steps=60,
    success=success,
    failure=failure,
    reward_terms=terms,
)
