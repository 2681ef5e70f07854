"""How the camera moves in a clip: the similarity that best explains the optical flow, and words for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from wfm_core.curation.measures import MEASURED, Measures, luma, optical_flow

GRID = 5
"""Pixels between the points at which flow is looked at."""
TEXTURE = 8.0
"""Gradient of luma, of 255 a pixel, below which flow is a guess."""
INLIER = 0.75 / MEASURED[1]
"""Widths by which a point may miss the similarity."""
LEAST_POINTS = 12


@dataclass
class CameraLimits:
    """From where on a motion has a name.

    Attributes:
        shift: widths per second, of pan and tilt.
        zoom: logarithm of the scale per second.
        roll: radians per second.
        jitter: widths, of what changes in the motion from one step to the next.
        steady: share of a motion that must not cancel itself out, so that to and fro is no pan.
    """

    shift: float = 0.04
    zoom: float = 0.04
    roll: float = 0.05
    jitter: float = 0.008
    steady: float = 0.5


def camera_motion(frames: np.ndarray, aspect: float, fps: float) -> dict[str, float]:
    """Measure how the camera moves, by what most textured points do: things that move are few.

    Args:
        frames: (T, H, W, 3) uint8, T >= 1.
        aspect: width by height, as it is to be shown; frames may be squashed.
        fps: frames per second of `frames`.

    Returns:
        Means over the clip, signed: `pan` to the right and `tilt` upwards, widths per second; `zoom` in, logarithm of
        the scale per second; `roll` clockwise, radians per second; `jitter`, widths; and `steady_pan`, `steady_tilt`,
        `steady_zoom`, `steady_roll`, in [0, 1], the share of each motion that does not cancel itself out.
    """
    grey = luma(frames)
    moves = np.array([_similarity(*pair, aspect) for pair in zip(grey[:-1], grey[1:], strict=True)]).reshape(-1, 4)
    mean = moves.mean(axis=0) if len(moves) else np.zeros(4)
    total = np.abs(moves).mean(axis=0) if len(moves) else np.zeros(4)
    steady = np.abs(mean) / np.maximum(total, 1e-9)
    jitter = np.hypot(*np.diff(moves[:, :2], axis=0).T).mean() if len(moves) > 1 else 0.0
    names = ("pan", "tilt", "zoom", "roll")
    found = {name: float(fps * value) for name, value in zip(names, mean, strict=True)}
    return found | {f"steady_{n}": float(s) for n, s in zip(names, steady, strict=True)} | {"jitter": float(jitter)}


def camera_tags(measures: Measures, limits: CameraLimits) -> list[str]:
    """Name the motions that `camera_motion` measured; "static" if there is none."""
    words: Sequence[tuple[str, float, str, str]] = (
        ("pan", limits.shift, "pan_right", "pan_left"),
        ("tilt", limits.shift, "tilt_up", "tilt_down"),
        ("zoom", limits.zoom, "zoom_in", "zoom_out"),
        ("roll", limits.roll, "roll_clockwise", "roll_counterclockwise"),
    )
    tags = [
        more if measures[name] > 0 else less
        for name, limit, more, less in words
        if abs(measures[name]) > limit and measures[f"steady_{name}"] > limits.steady
    ]
    return [*tags, *(["shaky"] if measures["jitter"] > limits.jitter else [])] or ["static"]


def _similarity(before: np.ndarray, after: np.ndarray, aspect: float) -> np.ndarray:
    """What the camera does from one picture to the next: right, up, in, clockwise; zeros where nothing is to be seen.

    The pictures' contents do the opposite, but for the zoom.
    """
    height, width = before.shape
    y, x = (each.ravel() for each in np.mgrid[GRID // 2 : height : GRID, GRID // 2 : width : GRID])
    gradient = cv2.magnitude(cv2.Sobel(before, cv2.CV_32F, 1, 0), cv2.Sobel(before, cv2.CV_32F, 0, 1)) / 8
    textured = gradient[y, x] > TEXTURE
    y, x = y[textured], x[textured]
    if len(x) < LEAST_POINTS:
        return np.zeros(4)
    flow = optical_flow(before, after)[y, x]
    units = np.array([1 / width, 1 / (height * aspect)])  # one unit is a width, along either axis
    start = (np.stack([x - width / 2, y - height / 2], axis=1) * units).astype(np.float32)
    matrix, _ = cv2.estimateAffinePartial2D(start, start + (flow * units).astype(np.float32), None, cv2.RANSAC, INLIER)
    if matrix is None:
        return np.zeros(4)
    cosine, sine = matrix[:, 0]
    return np.array([-matrix[0, 2], matrix[1, 2], np.log(np.hypot(cosine, sine)), -np.arctan2(sine, cosine)])
