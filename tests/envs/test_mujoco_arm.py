import numpy as np
import pytest

pytest.importorskip("mujoco")

from envs.mujoco_arm import (
    INITIAL_QPOS,
    MIN_EE_HEIGHT,
    ArmKinematics,
    BridgeController,
    euler_to_matrix,
    finger_target,
    matrix_to_euler,
    openness,
)


@pytest.fixture(scope="module")
def kinematics():
    return ArmKinematics()


def act(**values):
    order = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
    return np.array([values.get(name, 0.0) for name in order])


@pytest.mark.parametrize(
    ("qpos", "expected"),
    [
        (np.zeros(6), (0.4583, 0.0, 0.3607)),
        ([-0.1319, -0.7624, 0.4449, -0.0199, 1.7564, -0.1595], (0.120, -0.019, 0.247)),
        (INITIAL_QPOS, (0.292, -0.006, 0.135)),
    ],
)
def test_forward_kinematics_gives_the_published_poses(kinematics, qpos, expected):
    position, _ = kinematics.forward(np.array(qpos))
    np.testing.assert_allclose(position, expected, atol=6e-4)


def test_zero_pose_points_forward_which_is_a_pitch_of_minus_90_degrees_from_down(kinematics):
    _, rotation = kinematics.forward(np.zeros(6))
    np.testing.assert_allclose(rotation, euler_to_matrix(0, -np.pi / 2, 0), atol=1e-9)


def test_initial_pose_points_down(kinematics):
    _, rotation = kinematics.forward(INITIAL_QPOS)
    assert np.abs(matrix_to_euler(rotation)).max() < 0.06


def test_euler_angles_follow_rz_ry_rx_and_invert():
    angles = np.array([0.3, -0.5, 1.2])
    np.testing.assert_allclose(matrix_to_euler(euler_to_matrix(*angles)), angles)
    yaw_of_pitched = euler_to_matrix(0, 0.4, np.pi / 2) @ (1, 0, 0)
    np.testing.assert_allclose(yaw_of_pitched, (0, np.cos(0.4), -np.sin(0.4)), atol=1e-12)


def test_inverse_kinematics_inverts_forward_over_the_workspace(kinematics):
    rng = np.random.default_rng(0)
    for _ in range(40):
        position, rotation = rng.uniform((0.2, -0.15, 0.02), (0.4, 0.2, 0.2)), euler_to_matrix(0, 0, rng.uniform(-1, 1))
        qpos = kinematics.inverse(position, rotation, INITIAL_QPOS)
        assert qpos is not None
        reached, orientation = kinematics.forward(qpos)
        np.testing.assert_allclose(reached, position, atol=6e-4)
        np.testing.assert_allclose(orientation, rotation, atol=8e-3)


def test_inverse_kinematics_gives_up_out_of_reach(kinematics):
    assert kinematics.inverse(np.array([0.9, 0.0, 0.2]), np.eye(3), INITIAL_QPOS) is None


def test_deltas_add_to_the_previous_target_not_to_the_measured_pose(kinematics):
    controller = BridgeController(kinematics)
    start = controller.position.copy()
    lagging = start - (0.01, 0.0, 0.0)  # where the arm is measured must not matter without rotation
    for _ in range(3):
        assert controller.advance(act(dx=0.02, dz=0.01), lagging)
    np.testing.assert_allclose(controller.position, start + (0.06, 0.0, 0.03), atol=1e-12)


def test_rotation_keeps_the_position_and_turns_about_the_world_axes(kinematics):
    controller = BridgeController(kinematics)
    start, before = controller.position.copy(), controller.rotation.copy()
    assert controller.advance(act(droll=0.1, dpitch=0.05, dyaw=0.2), start)
    np.testing.assert_allclose(controller.position, start, atol=1e-12)
    np.testing.assert_allclose(controller.rotation, euler_to_matrix(0.1, 0.05, 0.2) @ before, atol=1e-12)


def test_rotation_is_about_the_measured_position(kinematics):
    controller = BridgeController(kinematics)
    target = controller.position.copy()
    measured = target - (0.02, 0.0, 0.0)
    controller.advance(act(dyaw=0.2), measured)
    expected = measured + (0.02 * np.cos(0.2), 0.02 * np.sin(0.2), 0.0)
    np.testing.assert_allclose(controller.position, expected, atol=1e-12)


def test_actions_are_clipped_to_bridges_limits(kinematics):
    controller = BridgeController(kinematics)
    start = controller.position.copy()
    controller.advance(act(dx=1.0, dyaw=0.0, gripper=3.0), start)
    np.testing.assert_allclose(controller.position - start, (0.05, 0, 0), atol=1e-8)
    assert controller.gripper == 1.0


def test_a_target_out_of_reach_means_no_motion_but_the_gripper_obeys(kinematics):
    controller = BridgeController(kinematics)
    while controller.advance(act(dx=0.05, gripper=1.0), controller.position):
        pass
    position, joints = controller.position.copy(), controller.joints.copy()
    assert not controller.advance(act(dx=0.05, gripper=0.0), controller.position)
    np.testing.assert_array_equal(controller.position, position)
    np.testing.assert_array_equal(controller.joints, joints)
    assert controller.gripper == 0.0


def test_targets_stay_above_the_floor(kinematics):
    controller = BridgeController(kinematics)
    for _ in range(6):
        controller.advance(act(dz=-0.05), controller.position)
    assert controller.position[2] == MIN_EE_HEIGHT


@pytest.mark.parametrize("bad", [np.zeros(6), np.full(7, np.nan)])
def test_bad_actions_are_refused(kinematics, bad):
    with pytest.raises(ValueError, match="7 finite numbers"):
        BridgeController(kinematics).advance(bad, np.zeros(3))


def test_gripper_mapping_is_bridges():
    assert openness(0.010) == 0.0
    assert openness(0.0225) == pytest.approx(0.5)
    assert openness(0.037) == 1.0
    assert finger_target(1.0) == pytest.approx(0.037)
    assert finger_target(0.0) < 0.015  # beyond the stop, so that a closed gripper presses
