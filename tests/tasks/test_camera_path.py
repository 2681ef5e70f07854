"""A moving camera: smooth, near the fixed one, and looking at the workspace."""

from dataclasses import astuple

import numpy as np
import pytest

from tasks.camera import CAMERAS
from tasks.camera_path import camera_path

TIMES = np.arange(121) / 5


def turned(a, b) -> float:
    """Degrees between two cameras' rotations."""
    return np.degrees(np.arccos(np.clip((np.trace(a.rotation.T @ b.rotation) - 1) / 2, -1, 1)))


def path(seed, motion=1.0, times=TIMES, scene="table"):
    return camera_path(CAMERAS[scene], motion, times, np.random.default_rng(seed))


@pytest.mark.parametrize("scene", CAMERAS)
def test_without_motion_it_is_the_fixed_camera(scene):
    for camera in path(0, 0.0, scene=scene):
        assert camera.position == pytest.approx(CAMERAS[scene].position, abs=1e-12)
        assert camera.rotation == pytest.approx(CAMERAS[scene].rotation, abs=1e-12)


def test_it_is_decided_by_the_generator_and_not_by_the_times_asked_for():
    first, other, shorter = path(1), path(2), path(1, times=TIMES[:7])
    assert [astuple(camera) for camera in first[:7]] == [astuple(camera) for camera in shorter]
    assert turned(first[0], other[0]) > 1


@pytest.mark.parametrize("scene", CAMERAS)
def test_it_moves_smoothly_and_always_looks_at_the_workspace(scene):
    target = CAMERAS[scene].unproject(np.array([0.5, 0.5]), 0.0)
    for seed in range(6):
        cameras = path(seed, scene=scene)
        steps = [turned(a, b) for a, b in zip(cameras, cameras[1:], strict=False)]
        bends = np.diff([camera.position for camera in cameras], n=2, axis=0)
        assert 0.1 < np.mean(steps) and max(steps) < 4  # degrees a frame
        assert np.linalg.norm(bends, axis=1).max() < 0.01  # m
        for camera in cameras:
            assert np.abs(camera.project(target) - 0.5).max() < 0.1
            away = np.asarray(camera.position) - target
            assert 20 < np.degrees(np.arctan2(away[2], np.hypot(*away[:2]))) < 65
            assert 0.85 < np.linalg.norm(away) / np.linalg.norm(np.asarray(CAMERAS[scene].position) - target) < 1.4
            assert camera.focal_uv == pytest.approx(CAMERAS[scene].focal_uv)


def test_it_keeps_to_the_side_on_which_the_arm_is_not():
    left = [camera.position[1] for seed in range(50) for camera in path(seed, times=TIMES[::10])]
    assert max(left) < -0.07 and min(left) < -0.4  # the arm is 0.04 m to both sides of 0


def test_motion_scales_the_path():
    half, whole = path(3, 0.5), path(3)
    fixed = CAMERAS["table"]
    assert 0.4 < turned(half[0], fixed) / turned(whole[0], fixed) < 0.6
    assert len({round(np.degrees(np.arcsin(camera.rotation[2, 0])), 3) for camera in whole}) > 50  # it rolls
