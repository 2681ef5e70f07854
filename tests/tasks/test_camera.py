"""Projections invert each other and agree with the published pose."""

import numpy as np
import pytest

from tasks.camera import CAMERAS, Camera


@pytest.mark.parametrize("scene", CAMERAS)
def test_unproject_inverts_project(scene: str) -> None:
    camera, rng = CAMERAS[scene], np.random.default_rng(0)
    points = rng.uniform([0.15, -0.2, 0.0], [0.45, 0.2, 0.1], (100, 3))
    assert camera.unproject(camera.project(points), points[:, 2]) == pytest.approx(points, abs=1e-9)


@pytest.mark.parametrize("scene", CAMERAS)
def test_image_axes(scene: str) -> None:
    camera = CAMERAS[scene]
    assert camera.rotation.T @ camera.rotation == pytest.approx(np.eye(3), abs=1e-12)
    assert np.linalg.det(camera.rotation) == pytest.approx(1)
    middle = np.asarray(camera.position) + 0.4 * np.asarray(camera.forward)
    assert camera.project(middle) == pytest.approx([0.5, 0.5])
    # the robot looks along +x; +y is its left, and the camera stands on its right and looks left
    assert camera.project(middle + [0, 0, 0.05])[1] < 0.5
    assert camera.project(middle - [0, 0.05, 0])[0] > 0.5


def test_focal_length_fixes_the_field_of_view() -> None:
    camera = CAMERAS["table"]
    edge = np.asarray(camera.position) + camera.rotation @ [320 / 623.588, 0, 1]
    assert camera.project(edge) == pytest.approx([1.0, 0.5])
    edge = np.asarray(camera.position) + camera.rotation @ [0, 240 / 623.588, 1]
    assert camera.project(edge) == pytest.approx([0.5, 1.0])


def test_up_is_up_in_the_image() -> None:
    camera = Camera(position=(0.1, 0.2, 0.3), forward=(0.0, 0.0, -2.0), up=(3.0, 0.0, 1.0))  # looks down, +x is up
    assert camera.rotation == pytest.approx(np.array([[0, -1, 0], [-1, 0, 0], [0, 0, -1.0]]))
    below = np.asarray(camera.position) - [0.0, 0.0, 0.2]
    assert camera.project(below + [0.01, 0, 0]) == pytest.approx([0.5, 0.5 - 0.05 * camera.focal_uv[1]])
    assert camera.project(below + [0, 0.01, 0]) == pytest.approx([0.5 - 0.05 * camera.focal_uv[0], 0.5])
