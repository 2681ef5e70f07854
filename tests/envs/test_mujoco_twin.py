import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mujoco")

from envs.mujoco_factors import Factors, place_distractors
from envs.mujoco_twin import MujocoBridge, Stage
from tasks import TASKS
from tasks.camera import CAMERAS, THIRD_PERSON, WRIST
from tasks.camera_path import camera_path
from wfm_core.data.actions import MAX_TRANSLATION, hold_action

GRASPED = [
    ("stack_cubes", "green_cube"),
    ("push_cube", "red_cube"),
    ("put_carrot_on_plate", "carrot"),
    ("put_spoon_on_towel", "spoon"),
    ("put_eggplant_in_basket", "eggplant"),
]


@pytest.fixture(scope="module")
def stages():
    made = {name: Stage(task) for name, task in TASKS.items()}
    yield made
    for stage in made.values():
        stage.close()


def start(stages, name, state=0, seed=0):
    twin = MujocoBridge(TASKS[name], stage=stages[name])
    twin.reset(TASKS[name].initial_states[state], np.random.default_rng(seed))
    return twin


def go(twin, target, yaw, gripper, steps):
    """Servo to a point and yaw; return for every step whether `grasped` was set."""
    for _ in range(steps):
        pose = twin.agent_pos()
        delta = np.clip((target - pose[:3]) * 0.8, -MAX_TRANSLATION, MAX_TRANSLATION)
        turn = np.clip([-pose[3], -pose[4], (yaw - pose[5] + np.pi / 2) % np.pi - np.pi / 2], -0.25, 0.25)
        twin.step(np.array([*delta, *turn, gripper], dtype=np.float32))


def pick(twin, name, offset=(0.0, 0.0, 0.0)):
    """Reach down for an object, close, lift by 12 cm; return how high it rose."""
    state = twin.task_state()
    centre, quat = state.positions[name] + offset, state.quats[name]
    yaw = 2 * np.arctan2(quat[3], quat[0])
    low = np.array([centre[0], centre[1], max(centre[2] - 0.002, 0.012)])
    go(twin, low + (0, 0, 0.09), yaw, 1.0, 9)
    go(twin, low, yaw, 1.0, 6)
    go(twin, low, yaw, 0.0, 3)
    go(twin, low + (0, 0, 0.12), yaw, 0.0, 6)
    return twin.task_state().positions[name][2] - state.positions[name][2]


@pytest.mark.parametrize(("task", "name"), GRASPED)
def test_a_grasped_object_rises_with_the_gripper_and_stays_in_it(stages, task, name):
    twin = start(stages, task, state=5)
    assert pick(twin, name) > 0.09
    before = twin.task_state()
    assert before.grasped == name
    assert 0.2 < before.gripper < 1.0
    go(twin, before.ee_pos + (-0.04, 0.05, 0.0), float(twin.agent_pos()[5]) + 0.7, 0.0, 8)
    after = twin.task_state()
    assert after.grasped == name
    offsets = [np.linalg.norm(state.positions[name] - state.ee_pos) for state in (before, after)]
    assert abs(offsets[1] - offsets[0]) < 0.004
    go(twin, after.ee_pos, float(twin.agent_pos()[5]), 1.0, 4)
    assert twin.task_state().grasped is None
    assert twin.task_state().positions[name][2] < 0.05


def test_a_missed_object_stays(stages):
    twin = start(stages, "stack_cubes")
    before = twin.task_state().positions["green_cube"]
    assert abs(pick(twin, "green_cube", offset=(0.0, 0.07, 0.0))) < 1e-3
    state = twin.task_state()
    assert state.grasped is None
    np.testing.assert_allclose(state.positions["green_cube"], before, atol=1e-3)
    assert state.gripper == pytest.approx(0.2, abs=0.05)  # closed on nothing: the fingers' stop gives a little


@pytest.mark.parametrize("name", TASKS)
def test_every_initial_state_settles_where_it_was_placed(stages, name):
    twin = MujocoBridge(TASKS[name], stage=stages[name])
    for initial in TASKS[name].initial_states[::4]:
        twin.reset(initial, np.random.default_rng(0))
        state = twin.task_state()
        for item, pose in initial.items():
            np.testing.assert_allclose(state.positions[item], (pose.x, pose.y, pose.z), atol=1.5e-3)
            np.testing.assert_array_equal(state.initial_positions[item], state.positions[item])
        expected = frozenset() if TASKS[name].source is None else {"table"}
        assert state.source_contacts == expected
        assert state.grasped is None
        assert not TASKS[name].success(state)
        assert not TASKS[name].failure(state)


def test_the_arm_covers_most_of_a_step_in_a_step_and_arrives_in_the_next(stages):
    twin = start(stages, "reach_target")
    before = twin.agent_pos()[0]
    twin.step(np.array([0.05, 0, 0, 0, 0, 0, 1.0]))
    assert 0.6 * 0.05 < twin.agent_pos()[0] - before < 0.05
    twin.step(hold_action(1.0))
    assert twin.agent_pos()[0] - before == pytest.approx(0.05, abs=0.004)


def test_holding_still_keeps_the_pose(stages):
    twin = start(stages, "reach_target")
    before = twin.agent_pos()
    for _ in range(10):
        twin.step(hold_action(1.0))
    np.testing.assert_allclose(twin.agent_pos(), before, atol=2e-3)


def test_same_seed_and_actions_give_the_same_bits(stages):
    actions = np.random.default_rng(3).uniform(-1, 1, (8, 7)) * [0.05, 0.05, 0.05, 0.1, 0.1, 0.25, 1]

    def play():
        twin = start(stages, "put_carrot_on_plate", state=3)
        frames = []
        for action in actions:
            twin.step(action)
            frames.append(twin.render())
        return np.array(frames), twin.agent_pos(), twin.task_state().positions["carrot"]

    for first, second in zip(play(), play(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_camera_sees_objects_where_its_projection_says(stages):
    for name in ("stack_cubes", "put_eggplant_in_basket"):
        twin = start(stages, name, state=9)
        labels = twin.render(segmentation=True)
        state = twin.task_state()
        for index, item in enumerate(TASKS[name].objects):
            rows, columns = np.nonzero(labels == index)
            seen = np.array([columns.mean(), rows.mean()]) + 0.5
            expected = CAMERAS[TASKS[name].scene].project(state.positions[item.name]) * 128
            assert np.abs(seen - expected).max() < 4  # px; an object's visible part is not centred on its centre
        assert (labels == -2).any() and (labels == -1).any()  # robot and scenery


def centroid(labels, index):
    """(u, v) of the middle of an object's visible pixels."""
    rows, columns = np.nonzero(labels == index)
    return (np.array([columns.mean(), rows.mean()]) + 0.5) / len(labels)


def test_a_camera_anywhere_sees_objects_where_its_projection_says(stages):
    for name in ("stack_cubes", "put_eggplant_in_basket"):
        twin = start(stages, name, state=9)
        state = twin.task_state()
        for camera in camera_path(CAMERAS[TASKS[name].scene], 1.0, np.arange(0.0, 12, 3), np.random.default_rng(0)):
            labels = twin.render(segmentation=True, camera=camera)
            for index, item in enumerate(TASKS[name].objects):
                expected = camera.project(state.positions[item.name])
                assert np.abs(centroid(labels, index) - expected).max() < 4 / 128


def test_the_fixed_camera_put_where_it_stands_gives_the_same_frame(stages):
    twin = start(stages, "put_carrot_on_plate")
    still = twin.render()
    for camera in (CAMERAS["table"], twin.camera(THIRD_PERSON)):
        np.testing.assert_array_equal(twin.render(camera=camera), still)
    elsewhere = camera_path(CAMERAS["table"], 1.0, np.zeros(1), np.random.default_rng(0))[0]
    assert np.abs(twin.render(camera=elsewhere).astype(int) - still).mean() > 5
    zoomed = replace(CAMERAS["table"], focal=2 * CAMERAS["table"].focal)
    enlarged = still[32:96, 32:96].repeat(2, axis=0).repeat(2, axis=1)  # the middle, twice as large
    errors = [np.abs(twin.render(camera=zoomed).astype(int) - other).mean() for other in (enlarged, still)]
    assert errors[0] < 0.4 * errors[1]
    np.testing.assert_array_equal(twin.render(), still)


def test_the_wrist_camera_moves_with_the_arm(stages):
    twin = start(stages, "stack_cubes")
    poses, fingers = [], []
    for dyaw in (0.0, 0.25, 0.25):
        twin.step(np.array([0.03, 0.0, -0.02, 0, 0, dyaw, 1.0], np.float32))
        camera, tip = twin.camera(WRIST), twin.task_state().ee_pos
        poses.append(camera.rotation.T @ (tip - camera.position))
        fingers.append(camera.project(tip))
        np.testing.assert_allclose(np.linalg.det(camera.rotation), 1)
        robot = twin.render(segmentation=True, camera=WRIST) == -2
        assert 0.03 < robot.mean() < 0.25 and robot[-8:].any() and not robot[:64].any()  # fingers below, no arm above
        np.testing.assert_array_equal(twin.render(camera=camera), twin.render(camera=WRIST))
    np.testing.assert_allclose(poses, poses[:1] * 3, atol=1e-9)  # fixed to the gripper
    np.testing.assert_allclose(np.array(fingers)[:, 0], 0.5, atol=1e-9)
    turn = twin.camera(WRIST).rotation.T @ start(stages, "stack_cubes").camera(WRIST).rotation
    assert np.arccos((np.trace(turn) - 1) / 2) == pytest.approx(0.5, abs=0.1)


def test_the_wrist_camera_sees_an_object_all_the_way_down_to_it(stages):
    twin = start(stages, "stack_cubes", state=5)
    cube = twin.task_state().positions["green_cube"]
    seen = []
    for height in (0.12, 0.09, 0.06, 0.03):
        go(twin, cube + (0, 0, height), 0.0, 1.0, 5)
        labels = twin.render(segmentation=True, camera=WRIST)
        seen.append((labels == 0).sum())
        assert np.abs(centroid(labels, 0) - twin.camera(WRIST).project(cube)).max() < 0.05
    assert seen == sorted(seen) and seen[0] > 50


def test_cameras_of_an_episode_with_factors_are_its_own():
    task = TASKS["stack_cubes"]
    stage = Stage(task, Factors(camera=True))
    first, second = (MujocoBridge(task, stage=stage) for _ in range(2))
    first.reset(task.initial_states[0], np.random.default_rng(1))
    camera, frame = first.camera(THIRD_PERSON), first.render()
    second.reset(task.initial_states[0], np.random.default_rng(2))
    assert second.camera(THIRD_PERSON) != camera != CAMERAS["table"]
    assert first.camera(THIRD_PERSON) == camera
    np.testing.assert_array_equal(first.render(camera=camera), frame)
    stage.close()


@pytest.mark.parametrize("name", TASKS)
def test_all_objects_are_in_view_in_every_initial_state(stages, name):
    twin = MujocoBridge(TASKS[name], stage=stages[name])
    for state in TASKS[name].initial_states[::3]:
        twin.reset(state, np.random.default_rng(0))
        labels = twin.render(segmentation=True)
        assert all((labels == index).sum() >= 20 for index in range(len(TASKS[name].objects)))


def test_frames_are_fresh_uint8_arrays(stages):
    twin = start(stages, "put_spoon_on_towel")
    first, second = twin.render(), twin.render()
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, second)
    assert first.std() > 20


@pytest.mark.parametrize("factor", ["table", "light", "camera", "object_color", "distractors"])
def test_a_factor_varies_with_the_seed_only(factor):
    task = TASKS["put_carrot_on_plate"]
    twin = MujocoBridge(task, Factors.of([factor]))

    def frame(seed):
        twin.reset(task.initial_states[0], np.random.default_rng(seed))
        return twin.render()

    first, other, again = frame(1), frame(2), frame(1)
    twin.close()
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 0.3


def test_without_factors_the_seed_changes_nothing_and_an_explicit_default_is_the_same(stages):
    task = TASKS["put_carrot_on_plate"]
    twin = MujocoBridge(task, Factors())
    twin.reset(task.initial_states[0], np.random.default_rng(99))
    np.testing.assert_array_equal(twin.render(), start(stages, "put_carrot_on_plate").render())
    twin.close()


def test_episodes_with_factors_share_a_stage_without_mixing_looks():
    task = TASKS["stack_cubes"]
    stage = Stage(task, Factors(table=True, light=True, camera=True))
    first, second = (MujocoBridge(task, stage=stage) for _ in range(2))
    first.reset(task.initial_states[0], np.random.default_rng(1))
    alone = first.render()
    second.reset(task.initial_states[0], np.random.default_rng(2))
    assert np.abs(second.render().astype(int) - alone).mean() > 1
    np.testing.assert_array_equal(first.render(), alone)
    stage.close()


def test_distractors_keep_clear_of_the_tasks_objects():
    for seed in range(20):
        taken = TASKS["put_carrot_on_plate"].initial_states[seed]
        for pose in place_distractors("table", taken, np.random.default_rng(seed)).values():
            assert min(np.hypot(pose.x - other.x, pose.y - other.y) for other in taken.values()) > 0.08


def test_unknown_factor_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'camera'"):
        Factors.of(["camra"])


def test_an_initial_state_must_place_exactly_the_objects(stages):
    twin = MujocoBridge(TASKS["stack_cubes"], stage=stages["stack_cubes"])
    with pytest.raises(ValueError, match="green_cube"):
        twin.reset(TASKS["reach_target"].initial_states[0], np.random.default_rng(0))


def test_close_twice():
    twin = MujocoBridge(TASKS["reach_target"])
    twin.reset(TASKS["reach_target"].initial_states[0], np.random.default_rng(0))
    twin.render()
    twin.close()
    twin.close()


def test_a_renderer_that_nobody_closed_leaves_quietly():
    lines = (
        "from envs.mujoco_twin import Stage",
        "from tasks import TASKS",
        "stage = Stage(TASKS['stack_cubes'])",
        "stage.renderer(32), stage.renderer(16)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
