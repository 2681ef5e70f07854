"""Every success definition at its boundary, in xy and in z, and failure."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tasks import REWARD_TERMS, TASKS, Task, TaskState, held

EPS = 1e-6

# task -> largest horizontal distance, lowest and highest height difference (centres, m), as published.
ON_TARGET = {
    "put_spoon_on_towel": (math.hypot(0.05, 0.05) + 0.003, 0.013 + 0.005 + 0.02),
    "put_carrot_on_plate": (math.hypot(0.055, 0.055) + 0.003, 0.019 + 0.003 + 0.02),
    "stack_cubes": (math.hypot(0.015, 0.015) + 0.003, 0.03 + 0.02),
    "put_eggplant_in_basket": (math.hypot(0.065, 0.04) + 0.003, 0.019 + 0.0225 + 0.06),
}
TOUCHES_ONLY_TARGET = {"put_carrot_on_plate", "stack_cubes"}


def state_at_reset(task: Task, index: int = 0) -> TaskState:
    """The moment of reset, with the gripper far above."""
    positions = {name: np.array([p.x, p.y, p.z]) for name, p in task.initial_states[index].items()}
    quats = {
        name: np.array([math.cos(p.yaw / 2), 0, 0, math.sin(p.yaw / 2)])
        for name, p in task.initial_states[index].items()
    }
    return TaskState(np.array([0.292, -0.006, 0.135]), 1.0, positions, quats, positions, None, frozenset({"table"}))


def with_offset(task: Task, offset: tuple[float, float, float], contacts: frozenset[str] | None = None) -> TaskState:
    """The source at `offset` from the target."""
    state = state_at_reset(task)
    positions = dict(state.positions)
    positions[task.source] = positions[task.target] + np.array(offset)
    contacts = frozenset({task.target}) if contacts is None else contacts
    return replace(state, positions=positions, source_contacts=contacts)


@pytest.mark.parametrize("name", ON_TARGET)
@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5, -1.6])
def test_on_target_boundary_in_the_plane(name: str, angle: float) -> None:
    task, (radius, top) = TASKS[name], ON_TARGET[name]
    for distance, expected in ((0.0, True), (radius - EPS, True), (radius + EPS, False)):
        offset = (distance * math.cos(angle), distance * math.sin(angle), top / 2)
        assert task.success(with_offset(task, offset)) is expected


@pytest.mark.parametrize("name", ON_TARGET)
def test_on_target_boundary_in_height(name: str) -> None:
    task, (_, top) = TASKS[name], ON_TARGET[name]
    for dz, expected in ((0.0, False), (EPS, True), (top - EPS, True), (top + EPS, False), (-0.01, False)):
        assert task.success(with_offset(task, (0.0, 0.0, dz))) is expected


def test_published_radii() -> None:
    rounded = {name: round(radius, 4) for name, (radius, _) in ON_TARGET.items()}
    assert rounded == {
        "put_spoon_on_towel": 0.0737,
        "put_carrot_on_plate": 0.0808,
        "stack_cubes": 0.0242,
        "put_eggplant_in_basket": 0.0793,
    }


@pytest.mark.parametrize("name", ON_TARGET)
def test_contact_rule(name: str) -> None:
    task, (_, top) = TASKS[name], ON_TARGET[name]
    offset = (0.0, 0.0, top / 2)
    both = frozenset({task.target, "table"})
    assert task.success(with_offset(task, offset, frozenset()))
    assert task.success(with_offset(task, offset, both)) is (name not in TOUCHES_ONLY_TARGET)


def test_an_eggplant_beside_the_basket_is_not_inside() -> None:
    task = TASKS["put_eggplant_in_basket"]
    state = with_offset(task, (0.0, 0.06, 0.0))
    state.positions["eggplant"][2] = 0.019  # rests on the sink's floor, nearer than the published radius
    assert not task.success(state)


def test_reach_boundary() -> None:
    task = TASKS["reach_target"]
    state = state_at_reset(task)
    marker = state.positions["marker"]
    direction = np.array([1.0, -2.0, 2.0]) / 3
    assert task.success(replace(state, ee_pos=marker + (0.025 - EPS) * direction))
    assert not task.success(replace(state, ee_pos=marker + (0.025 + EPS) * direction))
    assert not task.failure(replace(state, ee_pos=marker + 5))


def test_push_boundary() -> None:
    task = TASKS["push_cube"]
    rest = 0.02 - 0.001  # centre of the resting cube above centre of the disc
    for offset, expected in (
        ((0.05 - EPS, 0.0, rest), True),
        ((0.0, -0.05 - EPS, rest), False),
        ((0.0, 0.0, rest + 0.01 - EPS), True),
        ((0.0, 0.0, rest + 0.01 + EPS), False),
    ):
        assert task.success(with_offset(task, offset)) is expected


@pytest.mark.parametrize("name", [name for name in TASKS if name != "reach_target"])
def test_a_lost_source_is_a_failure(name: str) -> None:
    task = TASKS[name]
    assert not task.failure(state_at_reset(task))
    for axis, value in ((0, 0.53), (0, 0.04), (1, -0.33), (1, 0.35), (2, -0.04), (2, 0.46)):
        state = state_at_reset(task)
        state.positions[task.source][axis] = value
        assert task.failure(state)


@pytest.mark.parametrize("name", TASKS)
def test_no_initial_state_starts_solved_or_failed(name: str) -> None:
    task = TASKS[name]
    for index in range(24):
        state = state_at_reset(task, index)
        assert not task.success(state)
        assert not task.failure(state)
        assert task.reward_terms(state)["success"] == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_terms_are_named_bounded_and_pure(name: str) -> None:
    task, rng = TASKS[name], np.random.default_rng(3)
    for _ in range(50):
        positions = {item.name: rng.normal(0, 0.4, 3) for item in task.objects}
        copies = {key: value.copy() for key, value in positions.items()}
        state = replace(state_at_reset(task), positions=positions, ee_pos=rng.normal(0, 0.4, 3), grasped=task.source)
        values = task.reward_terms(state)
        assert tuple(values) == REWARD_TERMS
        assert all(0.0 <= value <= 1.0 and type(value) is float for value in values.values())
        assert values["success"] == float(task.success(state))
        assert all((positions[key] == copies[key]).all() for key in positions)


def test_a_flag_must_hold_for_so_many_frames_in_a_row():
    def flags(text: str) -> np.ndarray:
        return np.array([letter == "1" for letter in text], dtype=bool)

    assert held(flags("0111"), 3) and held(flags("11100"), 3) and held(flags("111"), 3) and held(flags("01"), 1)
    assert not held(flags("1101101"), 3) and not held(flags("11"), 3) and not held(flags(""), 1)
    assert not held(flags("000"), 1) and held(flags("0110111"))
