"""Reward terms with known values."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tasks import TASKS, TaskState
from tasks.reward import nearness, reward_terms

STATE = TaskState(
    ee_pos=np.array([0.3, 0.0, 0.1]),
    gripper=1.0,
    positions={"carrot": np.array([0.3, 0.0, 0.02]), "plate": np.array([0.3, 0.2, 0.003])},
    quats={},
    initial_positions={},
    grasped=None,
    source_contacts=frozenset({"table"}),
)


def test_nearness_is_one_minus_tanh_of_five_distances() -> None:
    assert nearness(0.0) == 1.0
    assert nearness(0.1) == pytest.approx(1 - math.tanh(0.5))


def test_values() -> None:
    values = reward_terms(STATE, source="carrot", target="plate", success=False)
    assert values == pytest.approx({"reach": nearness(0.08), "grasp": 0, "transport": nearness(0.2), "success": 0})
    held = replace(STATE, grasped="carrot")
    assert reward_terms(held, source="carrot", target="plate", success=True)["grasp"] == 1.0
    assert reward_terms(held, source="carrot", target="plate", success=True)["success"] == 1.0
    assert reward_terms(replace(STATE, grasped="plate"), source="carrot", target="plate", success=False)["grasp"] == 0


def test_without_a_source_the_end_effector_reaches_the_target() -> None:
    values = reward_terms(STATE, source=None, target="plate", success=False)
    distance = math.sqrt(0.2**2 + 0.097**2)
    assert values == pytest.approx({"reach": nearness(distance), "grasp": 0, "transport": 0, "success": 0})


def test_tasks_score_their_own_source_and_target() -> None:
    task = TASKS["put_carrot_on_plate"]
    assert task.reward_terms(replace(STATE, grasped="carrot"))["grasp"] == 1.0
    assert task.reward_terms(STATE)["reach"] == pytest.approx(nearness(0.08))
