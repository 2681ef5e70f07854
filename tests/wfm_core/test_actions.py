"""The action module: every conversion inverts, and agrees with the definition of the convention it converts."""

import numpy as np
import pytest

from wfm_core.data import actions as A


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_actions(rng, steps=50):
    return rng.uniform(A.ACTION_LOW, A.ACTION_HIGH, (steps, 7)).astype(np.float32)


def random_poses(rng, steps=51):
    low, high = [0.1, -0.2, 0, -1.4, -1.4, -3.1, 0], [0.4, 0.2, 0.3, 1.4, 1.4, 3.1, 1]
    return rng.uniform(low, high, (steps, 7)).astype(np.float32)


def rotation(axis, angle):
    c, s = np.cos(angle), np.sin(angle)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def test_the_box_maps_to_the_limits_and_back(rng):
    np.testing.assert_allclose(A.to_physical(np.ones(7)), A.ACTION_HIGH)
    np.testing.assert_allclose(A.to_physical(-np.ones(7)), A.ACTION_LOW, atol=1e-7)
    actions = random_actions(rng)
    np.testing.assert_allclose(A.to_physical(A.to_normalised(actions)), actions, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(\.\.\., 7\), got \(3, 6\)"):
        A.to_physical(np.zeros((3, 6)))


def test_hold_action_moves_nothing(rng):
    pose = random_poses(rng)[0]
    np.testing.assert_allclose(A.integrate(pose, A.hold_action(pose[6])[None])[1], pose, atol=1e-6)


def test_scaled_actions_have_the_published_factors_and_signs(rng):
    physical = A.from_scaled(np.array([1.75, -0.35, 0, 0.56, 0, -1.4, -1.0]))
    np.testing.assert_allclose(physical, [0.05, -0.01, 0, 0.1, 0, -0.25, 1.0], atol=1e-7)  # -1 is open
    assert A.from_scaled(np.array([0, 0, 0, 0, 0, 0, 1.0]))[6] == 0.0
    inside = random_actions(rng) * np.array([0.99] * 6 + [1], np.float32)
    np.testing.assert_allclose(A.from_scaled(A.to_scaled(inside)), inside, atol=1e-6)
    assert A.to_scaled(np.full(7, 1.0))[0] == np.float32(1.74)  # clipped, as in the source


def test_euler_angles_are_yaw_pitch_roll_about_fixed_axes(rng):
    euler = rng.uniform(-1.5, 1.5, (20, 3))
    matrices = A.euler_to_matrix(euler)
    for (roll, pitch, yaw), matrix in zip(euler, matrices, strict=True):
        np.testing.assert_allclose(matrix, rotation(2, yaw) @ rotation(1, pitch) @ rotation(0, roll), atol=1e-12)
    np.testing.assert_allclose(A.matrix_to_euler(matrices), euler, atol=1e-12)


def test_wrap_angle():
    np.testing.assert_allclose(
        A.wrap_angle(np.array([3.5, -3.5, 0.5, 2 * np.pi])), [3.5 - 2 * np.pi, 2 * np.pi - 3.5, 0.5, 0]
    )


def test_relabel_inverts_integrate_also_across_the_angle_seam(rng):
    start = np.array([0.3, 0, 0.1, 0.2, -0.1, 3.1, 1], np.float32)
    actions = random_actions(rng)
    actions[:, 5] = 0.2  # turns past pi
    poses = A.integrate(start, actions)
    assert np.abs(np.diff(poses[:, 5])).max() > 6  # the seam was crossed
    np.testing.assert_allclose(A.relabel(poses), actions, atol=2e-6)


def test_relabel_rotates_about_base_axes():
    poses = np.zeros((2, 7), np.float32)
    poses[0, 5] = np.pi / 2  # turned by yaw; then rolled about the base's x axis
    poses[1, 3:6] = A.matrix_to_euler(rotation(0, 0.2) @ rotation(2, np.pi / 2))
    np.testing.assert_allclose(A.relabel(poses)[0, 3:6], [0.2, 0, 0], atol=1e-6)


def test_gripper_frame_actions_follow_their_definition_and_invert(rng):
    poses = random_poses(rng)
    relative = A.to_gripper_frame(A.relabel(poses), poses)
    source, closedness = A.to_irasim_state(poses)
    for t in (0, 17, 49):  # as that data defines it: R_t^T (p_t+1 - p_t), R_t^T R_t+1, with its own roll
        frame, after = A.euler_to_matrix(source[t, 3:]), A.euler_to_matrix(source[t + 1, 3:])
        np.testing.assert_allclose(relative[t, :3], frame.T @ (source[t + 1, :3] - source[t, :3]), atol=1e-5)
        np.testing.assert_allclose(A.euler_to_matrix(relative[t, 3:6]), frame.T @ after, atol=1e-5)
        assert relative[t, 6] == pytest.approx(closedness[t + 1], abs=1e-6)
    actions = random_actions(rng)
    np.testing.assert_allclose(A.from_gripper_frame(A.to_gripper_frame(actions, poses), poses), actions, atol=1e-6)


def test_irasim_states_invert_and_have_their_roll_less_pi(rng):
    poses = random_poses(rng)
    state, closedness = A.to_irasim_state(poses)
    np.testing.assert_allclose(A.from_irasim_state(state, closedness), poses, atol=1e-6)
    down = A.from_irasim_state(np.array([0.3, 0, 0.1, -np.pi, 0, 0]), np.array(0.0))
    np.testing.assert_allclose(down, [0.3, 0, 0.1, 0, 0, 0, 1], atol=1e-6)  # pointing down, open


def test_bounds_are_read_off_the_data_but_for_outliers():
    rng = np.random.default_rng(0)
    episodes = [rng.uniform([-2, 5, 7, -1], [2, 5.5, 7, 1], (500, 4)) for _ in range(4)]
    episodes[0][0] = 1000
    space = A.action_space_of(episodes, num_steps=1)
    np.testing.assert_allclose(space.low[:2], [-2, 5], atol=0.1)
    np.testing.assert_allclose(space.high[:2], [2, 5.5], atol=0.1)
    assert (space.low[2], space.high[2]) == (6.5, 7.5)  # what is not used reads 0
    reached = np.concatenate([np.abs(np.cumsum(each[:, 0])) for each in episodes])
    assert space.dim == 4 and space.travel_scale == (np.quantile(reached, 0.99),)
    assert A.action_space_of(episodes).travel_dim == 0
    for wrong, said in (
        ([episodes[0], episodes[1][:, :2]], "one number of dimensions"),
        ([episodes[0] * np.nan], "finite"),
    ):
        with pytest.raises(ValueError, match=said):
            A.action_space_of(wrong)
    with pytest.raises(ValueError, match="at least 5"):
        A.action_space_of(episodes, num_steps=5)


def test_the_default_action_space_is_the_projects():
    assert np.array_equal(np.float32(A.BRIDGE_ACTIONS.low), A.ACTION_LOW)
    assert np.array_equal(np.float32(A.BRIDGE_ACTIONS.high), A.ACTION_HIGH) and A.BRIDGE_ACTIONS.travel_dim == 6
    for wrong in ({"low": (0.0,)}, {"travel_scale": (0.0,)}, {"travel_scale": (1.0,) * 8}):
        with pytest.raises(ValueError, match="low must lie|travel_scale must"):
            A.ActionSpace(**wrong)
