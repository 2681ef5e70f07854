"""A moving camera: a smooth random path about the workspace that begins near the fixed camera."""

from dataclasses import replace

import numpy as np

from tasks.camera import Camera

# Low and high of orbit, elevation, roll (degrees), distance (share of it), and x and y of what is looked at (m).
# The arm stands to the left of the fixed camera, so paths keep to its right.
_MIDDLE = ((5.0, 40.0), (-4.0, 10.0), (-2.0, 2.0), (0.0, 0.25), (-0.01, 0.01), (-0.01, 0.01))
_SWING = ((6.0, 16.0), (2.0, 6.0), (0.5, 2.0), (0.03, 0.10), (0.005, 0.02), (0.005, 0.02))
_PERIOD = (6.0, 16.0)  # s


def camera_path(camera: Camera, motion: float, times: np.ndarray, rng: np.random.Generator) -> list[Camera]:
    """Move a camera about the place z = 0 in the middle of its image.

    It orbits, rises, rolls, comes nearer and looks a little aside, each in a slow swing of its own about a middle that
    is not where the fixed camera stands.

    Args:
        camera: where it would stand still, looking down.
        motion: scales all that; 0 is `camera` itself, 1 orbits by up to 16 degrees to both sides of the middle.
        times: (N,) s at which it is wanted; what is drawn does not depend on them.
        rng: source of randomness.

    Returns:
        N cameras with the intrinsics of `camera`.
    """
    low, high = np.moveaxis(np.array([_MIDDLE, _SWING]), -1, 0)
    middle, swing = rng.uniform(low, high)  # (6,)
    period, phase = rng.uniform(*_PERIOD, len(middle)), rng.uniform(0, 2 * np.pi, len(middle))
    change = motion * (middle + swing * np.sin(2 * np.pi * np.asarray(times)[:, None] / period + phase))  # (N, 6)
    return [_moved(camera, *np.deg2rad(row[:3]), *row[3:]) for row in change]


def _moved(camera: Camera, orbit: float, rise: float, roll: float, dolly: float, dx: float, dy: float) -> Camera:
    target = camera.unproject(np.array([0.5, 0.5]), 0.0)
    x, y, z = np.asarray(camera.position) - target
    azimuth, elevation = np.arctan2(y, x) + orbit, np.arctan2(z, np.hypot(x, y)) + rise
    around = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    position = target + np.linalg.norm((x, y, z)) * (1 + dolly) * around
    level = replace(camera, position=tuple(position), forward=tuple(target + (dx, dy, 0.0) - position))
    right, down, _ = level.rotation.T
    return replace(level, up=tuple(np.sin(roll) * right - np.cos(roll) * down))
