"""The 24 initial states a task, random layouts and jitter."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from tasks import TASKS, InitialState, SceneObject, Task, jitter_initial_state, sample_initial_state
from tasks.camera import CAMERAS
from tasks.layout import FIXED_SPREAD, RANDOM_REGION, footprint_radius

NAMES = list(TASKS)


def corners(item: SceneObject, state: InitialState) -> np.ndarray:
    """(4, 2) corners of the object's footprint."""
    pose = state[item.name]
    half = np.array([[sx * item.size[0], sy * item.size[1]] for sx, sy in ((1, 1), (-1, 1), (-1, -1), (1, -1))]) / 2
    c, s = math.cos(pose.yaw), math.sin(pose.yaw)
    return half @ np.array([[c, s], [-s, c]]) + [pose.x, pose.y]


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Separating-axis test of two rectangles given by their corners."""
    for edges in (a, b):
        for i in range(2):
            edge = edges[i + 1] - edges[i]
            normal = np.array([-edge[1], edge[0]])
            if (a @ normal).max() < (b @ normal).min() or (b @ normal).max() < (a @ normal).min():
                return False
    return True


def pairs(task: Task) -> Iterator[tuple[SceneObject, SceneObject]]:
    return ((a, b) for i, a in enumerate(task.objects) for b in task.objects[i + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_registry_and_objects(name: str) -> None:
    task = TASKS[name]
    names = {item.name for item in task.objects}
    assert task.name == name
    assert task.target in names
    assert (task.source is None) == (name == "reach_target")
    assert task.source is None or task.source in names
    assert task.max_episode_steps == {"reach_target": 40, "put_eggplant_in_basket": 120}.get(name, 60)


@pytest.mark.parametrize("name", NAMES)
def test_24_distinct_states_in_view_without_overlap(name: str) -> None:
    task = TASKS[name]
    assert len(task.initial_states) == 24
    for i, state in enumerate(task.initial_states):
        assert set(state) == {item.name for item in task.objects}
        assert all(state != other for other in task.initial_states[:i])
        uv = CAMERAS[task.scene].project(np.array([[p.x, p.y, p.z] for p in state.values()]))
        assert np.all((uv > 0.02) & (uv < 0.98))
        assert not any(overlap(corners(a, state), corners(b, state)) for a, b in pairs(task))


@pytest.mark.parametrize("name", NAMES)
def test_objects_rest_on_the_table(name: str) -> None:
    task = TASKS[name]
    for item in task.objects:
        for state in task.initial_states:
            z = state[item.name].z
            assert z > item.size[2] if item.name == "marker" else z == item.size[2] / 2


@pytest.mark.parametrize("name", ["put_spoon_on_towel", "put_carrot_on_plate"])
def test_published_grid(name: str) -> None:
    task = TASKS[name]
    spots = {(round(state[task.source].x, 4), round(state[task.source].y, 4)) for state in task.initial_states}
    assert spots == {(0.232, -0.047), (0.232, 0.103), (0.382, -0.047), (0.382, 0.103)}
    for yaw in {state[task.source].yaw for state in task.initial_states}:
        routes = {
            (state[task.source].x, state[task.source].y, state[task.target].x, state[task.target].y)
            for state in task.initial_states
            if state[task.source].yaw == yaw
        }
        assert len(routes) == 12


@pytest.mark.parametrize("name", NAMES)
def test_random_layouts(name: str) -> None:
    task, rng = TASKS[name], np.random.default_rng(0)
    low, high = RANDOM_REGION[task.scene]
    drawn = [sample_initial_state(task, rng) for _ in range(60)]
    for state in drawn:
        assert list(state) == [item.name for item in task.objects]
        for a, b in pairs(task):
            gap = math.hypot(state[a.name].x - state[b.name].x, state[a.name].y - state[b.name].y)
            assert gap > footprint_radius(a) + footprint_radius(b)
        for item in task.objects:
            pose, published = state[item.name], task.initial_states[0][item.name]
            if item.name == "basket":
                assert max(abs(pose.x - published.x), abs(pose.y - published.y)) <= FIXED_SPREAD
            else:
                assert np.all((low <= [pose.x, pose.y]) & ([pose.x, pose.y] <= high))
    first = task.objects[0].name
    published = [state[first] for state in task.initial_states]
    assert np.ptp([s[first].x for s in drawn]) > np.ptp([p.x for p in published])
    assert np.ptp([s[first].y for s in drawn]) > np.ptp([p.y for p in published])


@pytest.mark.parametrize("name", NAMES)
def test_random_layouts_follow_the_generator(name: str) -> None:
    task = TASKS[name]
    assert sample_initial_state(task, np.random.default_rng(5)) == sample_initial_state(task, np.random.default_rng(5))
    assert sample_initial_state(task, np.random.default_rng(5)) != sample_initial_state(task, np.random.default_rng(6))


@pytest.mark.parametrize("name", NAMES)
def test_jitter_keeps_objects_apart_and_heights(name: str) -> None:
    task, rng = TASKS[name], np.random.default_rng(1)
    for state in task.initial_states:
        moved = jitter_initial_state(state, rng, 0.01)
        assert not any(overlap(corners(a, moved), corners(b, moved)) for a, b in pairs(task))
        for key, pose in state.items():
            assert moved[key].z == pose.z
            assert 0 < abs(moved[key].x - pose.x) <= 0.015 + 1e-9
            assert abs(moved[key].yaw - pose.yaw) <= 0.15 + 1e-9
    assert jitter_initial_state(task.initial_states[3], rng, 0.0) == task.initial_states[3]


def test_jitter_has_the_stated_scale() -> None:
    state, rng = TASKS["reach_target"].initial_states[0], np.random.default_rng(2)
    dx = [jitter_initial_state(state, rng, 0.01)["marker"].x - state["marker"].x for _ in range(4000)]
    assert 0.008 < np.std(dx) < 0.0095  # a standard normal cut at 1.5 has a standard deviation of 0.87


def test_negative_jitter_is_refused() -> None:
    with pytest.raises(ValueError, match="std must be >= 0, got -1"):
        jitter_initial_state({}, np.random.default_rng(0), -1)
