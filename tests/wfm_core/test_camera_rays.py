"""Rays of a frame's cells, against the projections of `tasks.camera`, which know nothing of them."""

import numpy as np
import pytest

from tasks.camera import CAMERAS, WRIST_CAMERA, Camera
from tasks.camera_path import camera_path
from wfm_core.data.camera_rays import FOCALS, POSES, camera_rays, pack_pose, rays_ahead, unpack_pose

GRID = (4, 6)
BASE = pack_pose(np.eye(3), np.zeros(3))


def pose_of(camera: Camera) -> np.ndarray:
    return pack_pose(camera.rotation, camera.position)


def centres() -> np.ndarray:
    """(h, w, 2) image fractions of the cells, u right and v down."""
    return np.array([[((j + 0.5) / GRID[1], (i + 0.5) / GRID[0]) for j in range(GRID[1])] for i in range(GRID[0])])


def rotation(rng) -> np.ndarray:
    made, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return made * np.sign(np.linalg.det(made))


def moving() -> list[Camera]:
    return camera_path(CAMERAS["table"], 1.0, np.arange(5.0), np.random.default_rng(0))


def test_poses_read_back_and_hold_the_axes_one_after_the_other():
    rng = np.random.default_rng(0)
    turns, places = np.stack([rotation(rng), rotation(rng)]), rng.normal(size=(2, 3))
    packed = pack_pose(turns, places)
    assert packed.shape == (2, 12) and packed.dtype == np.float32
    np.testing.assert_allclose(packed[1], [*turns[1][:, 0], *turns[1][:, 1], *turns[1][:, 2], *places[1]], rtol=1e-6)
    for got, expected in zip(unpack_pose(packed), (turns, places), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("camera", [*CAMERAS.values(), *moving()[::2]])
def test_what_a_cell_shows_lies_on_its_ray(camera):
    rays = camera_rays(pose_of(camera), camera.focal_uv, GRID, BASE)
    assert rays.shape == (*GRID, 6) and rays.dtype == np.float32
    direction, moment = rays[..., :3], rays[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, atol=1e-6)
    for z in (0.0, 0.1):
        points = camera.unproject(centres(), z)  # on the planes where the cells' middles see them
        np.testing.assert_allclose(np.cross(points, direction), moment, atol=1e-6)
        np.testing.assert_allclose(camera.project(points), centres(), atol=1e-9)
        assert ((points - camera.position) * direction).sum(-1).min() > 0  # in front, not behind


def test_points_of_the_reference_camera_lie_on_its_rays():
    """Seen from the first camera: a point has other coordinates, and still lies on the ray of its cell."""
    cameras = moving()
    rays = camera_rays(pose_of(cameras[3]), cameras[3].focal_uv, GRID, pose_of(cameras[0]))
    points = (cameras[3].unproject(centres(), 0.02) - cameras[0].position) @ cameras[0].rotation
    np.testing.assert_allclose(np.cross(points, rays[..., :3]), rays[..., 3:], atol=1e-6)
    own = camera_rays(pose_of(cameras[0]), cameras[0].focal_uv, (3, 3), pose_of(cameras[0]))
    np.testing.assert_allclose(own[..., 3:], 0, atol=1e-7)
    np.testing.assert_allclose(own[1, 1, :3], [0, 0, 1], atol=1e-7)
    assert own[1, 2, 0] > 0.2 and own[2, 1, 1] > 0.2  # right and down


def test_moving_everything_rigidly_changes_nothing():
    rng = np.random.default_rng(1)
    turn, shift = rotation(rng), rng.normal(size=3)
    first, last = moving()[0], WRIST_CAMERA

    def moved(camera):
        return pack_pose(turn @ camera.rotation, turn @ camera.position + shift)

    before = camera_rays(pose_of(last), last.focal_uv, GRID, pose_of(first))
    np.testing.assert_allclose(camera_rays(moved(last), last.focal_uv, GRID, moved(first)), before, atol=2e-6)
    assert np.abs(camera_rays(moved(last), last.focal_uv, GRID, pose_of(first)) - before).max() > 0.1


def test_a_batch_is_its_rows():
    cameras = moving()[:4]
    poses = np.stack([pose_of(camera) for camera in cameras]).reshape(2, 2, 12)
    focal = np.array([[[0.9, 1.2], [0.9, 1.2]], [[0.5, 0.7], [0.5, 0.7]]])
    rays = camera_rays(poses, focal, GRID, poses[:, :1])
    assert rays.shape == (2, 2, *GRID, 6)
    for b in range(2):
        for t in range(2):
            np.testing.assert_array_equal(rays[b, t], camera_rays(poses[b, t], focal[b, t], GRID, poses[b, 0]))


def test_what_is_no_pose_is_refused():
    with pytest.raises(ValueError, match=r"12 numbers, got shape \(3, 4\)"):
        camera_rays(np.zeros((3, 4)), np.ones(2), GRID, BASE)


def test_rays_ahead_are_those_of_a_frame_and_their_change_as_the_first_camera_sees_them():
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(6)]
    columns = {
        POSES: pack_pose(np.stack(turns), rng.normal(size=(6, 3))),
        FOCALS: rng.uniform(0.5, 2, (6, 2)).astype(np.float32),
    }
    rows = np.array([[1, 3], [4, 2]])
    told = rays_ahead(columns, rows, np.array([[1], [0]]), (2, 3))
    assert told.shape == (2, 2, 6, 12)
    for b, base in enumerate((1, 0)):
        for t in range(2):
            seen = [
                camera_rays(columns[POSES][row], columns[FOCALS][row], (2, 3), columns[POSES][base]).reshape(6, 6)
                for row in (rows[b, t], rows[b, t] + 1)
            ]
            np.testing.assert_array_equal(told[b, t, :, :6], seen[0])
            np.testing.assert_allclose(told[b, t, :, :6] + told[b, t, :, 6:] / 100, seen[1], atol=1e-5)
    with pytest.raises(ValueError, match="got none of"):
        rays_ahead({POSES: columns[POSES]}, rows, rows, (2, 3))
