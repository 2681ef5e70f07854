"""Camera poses as rows of numbers, and the rays along which a frame's cells look.

A pose is 12 numbers in a frame of reference, for recordings the robot base: the image's right, down and forward axes
and the optical centre, m. Focal lengths are fractions of the image's width and height; the optical axis is its middle.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

POSE_DIM = 12
STEP = 0.01
"""Usual change of a ray's direction, and of its moment in m, from one control step to the next."""
POSES, FOCALS = "camera.third_person", "focal.third_person"
"""Labels of a recording that say where each of its frames is seen from."""


def pack_pose(rotation: np.ndarray, position: ArrayLike) -> np.ndarray:
    """Return (..., 12) float32 of rotations (..., 3, 3), whose columns are the axes, and positions (..., 3), m."""
    axes = np.swapaxes(rotation, -1, -2).reshape(*np.shape(rotation)[:-2], 9)
    return np.concatenate([axes, np.asarray(position)], axis=-1).astype(np.float32)


def unpack_pose(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Invert `pack_pose`: rotations (..., 3, 3) and positions (..., 3), float64.

    Raises:
        ValueError: the last dimension is not 12.
    """
    pose = np.asarray(pose, dtype=np.float64)
    if pose.shape[-1:] != (POSE_DIM,):
        raise ValueError(f"a pose must be {POSE_DIM} numbers, got shape {pose.shape}")
    return np.swapaxes(pose[..., :9].reshape(*pose.shape[:-1], 3, 3), -1, -2), pose[..., 9:]


def camera_rays(pose: np.ndarray, focal: np.ndarray, grid: tuple[int, int], reference: np.ndarray) -> np.ndarray:
    """Return the Pluecker coordinates of the ray through the middle of every cell of a frame.

    Args:
        pose: (..., 12) of the camera.
        focal: (..., 2) focal lengths as fractions of the image's width and height.
        grid: rows h and columns w of cells.
        reference: (..., 12) pose of the camera in whose frame the rays are told, such as that of a clip's first frame.

    Returns:
        (..., h, w, 6) float32: unit direction d and moment o x d, m, where o is the optical centre.

    Raises:
        ValueError: a pose is not 12 numbers.
    """
    rotation, position = unpack_pose(pose)
    base, origin = unpack_pose(reference)
    inverse = np.swapaxes(base, -1, -2)
    turn, centre = inverse @ rotation, np.squeeze(inverse @ (position - origin)[..., None], -1)
    height, width = grid
    v, u = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    across = (np.stack([u, v], axis=-1) - 0.5) / np.asarray(focal, dtype=np.float64)[
        ..., None, None, :
    ]  # (..., h, w, 2)
    local = np.concatenate([across, np.ones_like(across[..., :1])], axis=-1)
    direction = np.einsum("...ij,...hwj->...hwi", turn, local / np.linalg.norm(local, axis=-1, keepdims=True))
    moment = np.cross(centre[..., None, None, :], direction)
    return np.concatenate([direction, moment], axis=-1).astype(np.float32)


def rays_ahead(
    columns: Mapping[str, np.ndarray], rows: np.ndarray, reference: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Return the rays of frames and how they change to the next one, seen by the cameras where rollouts begin.

    Args:
        columns: of a recording, one row a frame, with `POSES` (N, 12) and `FOCALS` (N, 2).
        rows: (...) of the frames.
        reference: (...) or broadcastable to it, rows of the frames where rollouts begin.
        grid: rows h and columns w of cells.

    Returns:
        (..., h * w, 12) float32, six of the frame and, in units of `STEP`, six of what the next one's add to them.

    Raises:
        ValueError: the recording does not say where its frames are seen from.
    """
    if missing := [name for name in (POSES, FOCALS) if name not in columns]:
        raise ValueError(f"rays need recordings with {POSES} and {FOCALS}, got none of {missing}")
    base = np.broadcast_to(columns[POSES][reference], (*np.shape(rows), POSE_DIM))
    now, ahead = (camera_rays(columns[POSES][at], columns[FOCALS][at], grid, base) for at in (rows, rows + 1))
    told = np.concatenate([now, (ahead - now) / STEP], axis=-1)
    return told.reshape(*np.shape(rows), grid[0] * grid[1], -1)
