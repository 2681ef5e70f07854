"""Initial states: the grids of the published layouts, random layouts for training data, and jitter."""

from collections.abc import Iterator

import numpy as np

from tasks.camera import CAMERAS
from tasks.task import InitialState, Pose, SceneObject, Task

RANDOM_REGION = {
    "table": (np.array([0.20, -0.10]), np.array([0.41, 0.16])),
    "sink": (np.array([0.20, -0.19]), np.array([0.29, -0.09])),
}
"""Scene -> low and high (x, y), m, of object centres in random layouts; it contains the published initial states."""

FIXED_SPREAD = 0.015
"""Half range, m, by which a fixed object (the basket) moves about its published place in random layouts."""

CLEARANCE = 0.012
"""Smallest gap, m, between the bounding circles of two objects in a random layout."""

MARKER_HEIGHT = (0.04, 0.16)
"""Range of z, m, of floating markers in random layouts."""

VIEW_MARGIN = 0.04
"""Fraction of the image at each edge in which no object's centre starts."""

JITTER_YAW_PER_METRE = 10.0
"""rad/m: jitter of 1 cm goes with 0.1 rad of yaw."""


def square_corners(center: tuple[float, float], half_edge: float) -> list[tuple[float, float]]:
    """Return the four (x, y) corners of an axis-aligned square, m."""
    return [(center[0] + sx * half_edge, center[1] + sy * half_edge) for sx in (-1, 1) for sy in (-1, 1)]


def ordered_pairs(points: list[tuple[float, float]]) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Yield every ordered pair of two different points."""
    return ((a, b) for a in points for b in points if a is not b)


def at_rest(item: SceneObject, xy: tuple[float, float], yaw: float = 0.0) -> Pose:
    """Return the pose of an object that rests on the table (z = 0) at (x, y), m, turned by `yaw`, rad."""
    return Pose(float(xy[0]), float(xy[1]), item.size[2] / 2, float(yaw))


def footprint_radius(item: SceneObject) -> float:
    """Return the radius (m) of the circle about the object's footprint."""
    return float(np.hypot(item.size[0], item.size[1])) / 2


def sample_initial_state(task: Task, rng: np.random.Generator) -> InitialState:
    """Draw a random layout, wider than the task's 24: any place in the region, any yaw, in random order, no overlap.

    Args:
        task: the task whose objects to place.
        rng: source of randomness.

    Returns:
        Object name -> pose. Objects are in view and at least `CLEARANCE` apart (bounding circles), so a source never
        starts on its target; fixed objects are near their published place.

    Raises:
        ValueError: the objects do not fit into the region.
    """
    low, high = RANDOM_REGION[task.scene]
    for _ in range(200):
        placed: dict[str, Pose] = {}
        for index in rng.permutation(len(task.objects)):
            item = task.objects[index]
            published = task.initial_states[0][item.name]
            if item.fixed and not item.ghost:
                xy = np.array([published.x, published.y]) + rng.uniform(-FIXED_SPREAD, FIXED_SPREAD, 2)
                pose = Pose(float(xy[0]), float(xy[1]), published.z, published.yaw)
            else:
                xy = rng.uniform(low, high)
                floating = published.z > item.size[2]
                z = float(rng.uniform(*MARKER_HEIGHT)) if floating else published.z
                pose = Pose(float(xy[0]), float(xy[1]), z, float(rng.uniform(-np.pi, np.pi)))
            placed[item.name] = pose
        if _apart(task, placed) and _in_view(task, placed):
            return {item.name: placed[item.name] for item in task.objects}
    raise ValueError(f"the objects of {task.name!r} must fit into view and x, y in {low}..{high}")


def jitter_initial_state(state: InitialState, rng: np.random.Generator, std: float) -> InitialState:
    """Shift every object by Gaussian noise in x, y and yaw, cut at 1.5 standard deviations; z stays.

    Args:
        state: the layout to vary; it is not changed.
        rng: source of randomness.
        std: standard deviation of x and of y, m; yaw gets `JITTER_YAW_PER_METRE` times as many rad.

    Raises:
        ValueError: `std` is negative.
    """
    if std < 0:
        raise ValueError(f"std must be >= 0, got {std}")
    jittered = {}
    for name, pose in state.items():
        dx, dy, dyaw = np.clip(rng.standard_normal(3), -1.5, 1.5) * std
        jittered[name] = Pose(
            float(pose.x + dx), float(pose.y + dy), pose.z, float(pose.yaw + JITTER_YAW_PER_METRE * dyaw)
        )
    return jittered


def _apart(task: Task, poses: InitialState) -> bool:
    for i, first in enumerate(task.objects):
        for second in task.objects[i + 1 :]:
            a, b = poses[first.name], poses[second.name]
            least = footprint_radius(first) + footprint_radius(second) + CLEARANCE
            if np.hypot(a.x - b.x, a.y - b.y) < least:
                return False
    return True


def _in_view(task: Task, poses: InitialState) -> bool:
    uv = CAMERAS[task.scene].project(np.array([[pose.x, pose.y, pose.z] for pose in poses.values()]))
    return bool(np.all((uv >= VIEW_MARGIN) & (uv <= 1 - VIEW_MARGIN)))
