"""Colour detection on painted images, and the whole policy in the rendered twin."""

import math

import numpy as np
import pytest

from policies.scripted_vision import PixelScene, VisionScriptedPolicy, color_mask, locate
from tasks import SUCCESS_HOLD_STEPS, TASKS
from tasks.camera import CAMERAS
from wfm_core.data.actions import to_physical

CARROT = TASKS["put_carrot_on_plate"].objects[0]
START = np.array([0.292, -0.006, 0.135, 0, 0, 0, 1], np.float32)


def painted(color, points: np.ndarray, scene: str = "table", size: int = 128) -> np.ndarray:
    """An image of a grey table with the pixels of `points` (N, 3) in `color`."""
    image = np.full((size, size, 3), 150, np.uint8)
    columns, rows = (CAMERAS[scene].project(points) * size).astype(int).T
    image[rows, columns] = np.array(color) * 255
    return image


def flat_box(x: float, y: float, z: float, yaw: float, length: float, width: float) -> np.ndarray:
    """Dense points of a rectangle at height z."""
    a, b = np.meshgrid(np.linspace(-length / 2, length / 2, 80), np.linspace(-width / 2, width / 2, 60))
    c, s = math.cos(yaw), math.sin(yaw)
    return np.stack([x + c * a - s * b, y + s * a + c * b, np.full_like(a, z)], axis=-1).reshape(-1, 3)


def test_every_object_is_told_from_the_others_and_from_greys_and_wood() -> None:
    for task in TASKS.values():
        for item in task.objects:
            for other in task.objects:
                swatch = np.tile((np.array(other.color) * 255).astype(np.uint8), (2, 2, 1))
                assert color_mask(swatch, item.color).all() == (item is other)
            for background in ((200, 200, 205), (30, 30, 34), (219, 181, 135), (160, 115, 75)):
                assert not color_mask(np.full((2, 2, 3), background, np.uint8), item.color).any()


def test_shade_does_not_change_the_mask() -> None:
    swatch = np.tile((np.array(CARROT.color) * 120).astype(np.uint8), (2, 2, 1))
    assert color_mask(swatch, CARROT.color).all()


@pytest.mark.parametrize("yaw", [-1.2, 0.0, 0.6, 1.5])
def test_locate_inverts_the_camera(yaw: float) -> None:
    points = flat_box(0.31, 0.04, CARROT.size[2] / 2, yaw, 0.1, 0.03)
    found = locate(color_mask(painted(CARROT.color, points), CARROT.color), CARROT, "table")
    assert found is not None
    assert found.position == pytest.approx([0.31, 0.04, CARROT.size[2] / 2], abs=3e-3)
    assert math.remainder(found.yaw - yaw, math.pi) == pytest.approx(0, abs=0.06)
    assert locate(np.zeros((128, 128), bool), CARROT, "table") is None


def test_a_marker_is_found_by_its_stalk() -> None:
    marker = TASKS["reach_target"].objects[0]
    ball = np.array([0.33, 0.02, 0.12])
    rng = np.random.default_rng(0)
    surface = rng.normal(size=(4000, 3))
    surface = ball + 0.015 * surface / np.linalg.norm(surface, axis=1, keepdims=True)
    stalk = ball - np.array([0, 0, 1]) * np.linspace(0, ball[2], 200)[:, None]
    image = painted(marker.color, np.concatenate([surface, stalk]))
    found = locate(color_mask(image, marker.color), marker, "table")
    assert found is not None
    assert found.position == pytest.approx(ball, abs=0.01)


def test_a_hidden_object_stays_where_it_was_and_a_held_one_is_between_the_fingers() -> None:
    task = TASKS["put_carrot_on_plate"]
    plate = task.objects[1]
    both = painted(CARROT.color, flat_box(0.25, 0.0, 0.019, 0.0, 0.1, 0.03))
    there = painted(plate.color, flat_box(0.38, 0.1, 0.003, 0.0, 0.1, 0.1)) != 150
    both[there.any(axis=-1)] = np.array(plate.color) * 255
    empty = np.full_like(both, 150)
    scene = PixelScene(task)
    scene.look(both, START)
    seen = scene.thing("carrot").position
    assert seen[:2] == pytest.approx([0.25, 0.0], abs=4e-3)
    assert not scene.solved()
    scene.look(empty, START)
    assert scene.thing("carrot").position == pytest.approx(seen)
    assert not scene.holding("carrot")
    over_plate = np.array([0.38, 0.1, 0.05, 0, 0, 0, 0.6], np.float32)
    scene.look(empty, over_plate)
    assert scene.holding("carrot")
    assert not scene.holding("plate")
    assert scene.thing("carrot").position == pytest.approx(over_plate[:3])
    assert scene.solved()


def test_rows_are_independent_and_a_masked_reset_leaves_the_others() -> None:
    task = TASKS["put_carrot_on_plate"]
    image = painted(CARROT.color, flat_box(0.25, 0.0, 0.019, 0.0, 0.1, 0.03))
    obs = {"pixels": np.stack([image] * 3), "agent_pos": np.stack([START] * 3)}
    one = {"pixels": image[None], "agent_pos": START[None]}

    def roll(policy, steps, batch):
        return [policy.act(batch) for _ in range(steps)]

    batch, single = VisionScriptedPolicy(0.5), VisionScriptedPolicy(0.5)
    batch.reset(3, instruction=task.instruction, seeds=[4, 5, 4])
    single.reset(1, instruction=task.instruction, seeds=[5])
    rows, alone = np.array(roll(batch, 6, obs)), np.array(roll(single, 6, one))
    assert rows.dtype == np.float32
    assert rows.shape == (6, 3, 7)
    assert np.abs(rows).max() <= 1
    assert (rows[:, 1] == alone[:, 0]).all()
    assert (rows[:, 0] == rows[:, 2]).all()
    assert (rows[:, 0] != rows[:, 1]).any()
    batch.reset(3, instruction=task.instruction, seeds=[4, 0, 0], mask=np.array([True, False, False]))
    again, on = np.array(roll(batch, 6, obs)), np.array(roll(single, 6, one))
    assert (again[:, 0] == rows[:, 0]).all()
    assert (again[:, 1] == on[:, 0]).all()


def test_bad_calls_are_named() -> None:
    with pytest.raises(ValueError, match="noise must be >= 0"):
        VisionScriptedPolicy(-1)
    policy = VisionScriptedPolicy()
    obs = {"pixels": np.zeros((2, 128, 128, 3), np.uint8), "agent_pos": np.zeros((2, 7), np.float32)}
    with pytest.raises(ValueError, match="reset must be called before act"):
        policy.act(obs)
    with pytest.raises(ValueError, match="instruction must be one of .* got 'fly'"):
        policy.reset(1, instruction="fly", seeds=[0])
    with pytest.raises(ValueError, match="one seed a row"):
        policy.reset(2, instruction="reach the red marker", seeds=[0])
    policy.reset(1, instruction="reach the red marker", seeds=[0])
    with pytest.raises(ValueError, match="must have 1 rows"):
        policy.act(obs)
    with pytest.raises(ValueError, match="mask must have shape"):
        policy.reset(2, instruction="reach the red marker", seeds=[0, 1], mask=np.array([True, False]))


@pytest.mark.parametrize("name", TASKS)
def test_the_policy_solves_the_tasks_from_rendered_pixels(name: str) -> None:
    pytest.importorskip("mujoco")
    from envs.mujoco_bridge import MujocoBridge

    task = TASKS[name]
    twin = MujocoBridge(task)
    twin.reset(task.initial_states[4], np.random.default_rng(0))
    try:
        twin.render()
    except RuntimeError as error:
        pytest.skip(str(error))
    policy = VisionScriptedPolicy()
    policy.reset(1, instruction=task.instruction, seeds=[0])
    held = 0
    for _ in range(task.max_episode_steps):
        obs = {"pixels": twin.render()[None], "agent_pos": twin.agent_pos()[None]}
        twin.step(to_physical(policy.act(obs)[0]))
        held = held + 1 if task.success(twin.task_state()) else 0
        if held >= SUCCESS_HOLD_STEPS:
            break
    twin.close()
    assert held >= SUCCESS_HOLD_STEPS
