"""What is measured of a clip, so that rules (`rules.py`) can tell what to keep: pure functions, one clip each.

Frames are measured at `MEASURED` pixels, whatever their size, so that one limit serves every resolution.
"""

from collections.abc import Mapping

import cv2
import numpy as np

from wfm_core.data.episode import Episode
from wfm_core.data.video import resize_frames

MEASURED = (96, 128)
"""Height and width at which frames are measured."""
DARK, BRIGHT = 20, 235
"""Mean luma, of 255, below and above which nothing is to be seen in a frame."""
STILL = 0.3
"""Mean change of luma, of 255, from one frame to the next, below which nothing has moved."""
LAGS = range(4)
"""Control steps by which pictures may trail commands."""
IDLE = np.array([1e-3] * 3 + [1e-2] * 3)
"""Commands, m and rad per step, below which an arm is not told to move."""

type Measures = Mapping[str, float]


def measure_frames(frames: np.ndarray) -> dict[str, float]:
    """Measure what is to be seen.

    Args:
        frames: (T, H, W, 3) uint8, T >= 1.

    Returns:
        `num_frames`, `height` and `width` as they are; `luma` (mean) and `contrast` (standard deviation within a
        frame), of 255; `dark` and `bright`, shares of frames in which nothing is to be seen; `sharpness`, the variance
        of the Laplacian in the middle frame by it; `frozen`, the share of steps in which nothing moves; `change`, of
        255, the mean change of luma of a step; `cut`, of 255, the largest median change of a pixel in a step, since an
        arm changes a part of the picture and a cut all of it; `flow`, how far a pixel moves in a step, of the picture's
        width; `camera`, how far the picture as a whole does, by the median over its pixels; `shake`, how much of that
        is back and forth.
    """
    grey = luma(frames)
    steps = np.abs(np.diff(grey.astype(np.float32), axis=0))
    change = steps.mean(axis=(1, 2))
    mean = grey.mean(axis=(1, 2))
    flows = [optical_flow(before, after) for before, after in zip(grey[:-1], grey[1:], strict=True)]
    shifts = np.array([np.median(flow.reshape(-1, 2), axis=0) for flow in flows]).reshape(-1, 2) / MEASURED[1]
    lengths = np.array([np.hypot(*np.moveaxis(flow, -1, 0)).mean() for flow in flows]) / MEASURED[1]
    return {
        "num_frames": float(len(frames)),
        "height": float(frames.shape[1]),
        "width": float(frames.shape[2]),
        "luma": float(mean.mean()),
        "contrast": float(grey.std(axis=(1, 2)).mean()),
        "dark": float((mean < DARK).mean()),
        "bright": float((mean > BRIGHT).mean()),
        "sharpness": float(np.median([cv2.Laplacian(each, cv2.CV_32F).var() for each in grey])),
        "frozen": float((change < STILL).mean()) if len(change) else 1.0,
        "change": float(change.mean()) if len(change) else 0.0,
        "cut": float(np.median(steps, axis=(1, 2)).max()) if len(change) else 0.0,
        "flow": float(lengths.mean()) if len(lengths) else 0.0,
        "camera": float(np.hypot(*shifts.T).mean()) if len(shifts) else 0.0,
        "shake": float(np.hypot(*np.diff(shifts, axis=0).T).mean()) if len(shifts) > 1 else 0.0,
    }


def measure_robot(episode: Episode) -> dict[str, float]:
    """Measure whether what is to be seen fits what the robot was told and felt; without actions there is nothing.

    Returns:
        `action_match`, the correlation of how much the picture changes in a step with how far the arm was told to
        move, at the lag at which it is highest; `idle`, the share of steps in which the arm is told nothing and nothing
        moves; `gripper_range`, of the commanded openness; and, of a robot that feels, `state_jump`, the longest way
        from one step to the next, m, and `state_match`, the correlation of commanded and felt moves, likewise.
    """
    if np.isnan(episode.actions).all() or len(episode.actions) < 2:
        return {}
    change = np.abs(np.diff(luma(episode.frames).astype(np.float32), axis=0)).mean(axis=(1, 2))
    told = np.linalg.norm(episode.actions[:, :6] / (5 * IDLE), axis=1)
    told = told + 2 * np.abs(np.diff(episode.actions[:, 6], prepend=episode.actions[0, 6]))
    still = (np.abs(episode.actions[:, :6]) < IDLE).all(axis=1) & (change < STILL)
    gripper = episode.actions[:, 6]
    found = {
        "action_match": max(_correlation(told, change, lag) for lag in LAGS),
        "idle": float(still.mean()),
        "gripper_range": float(gripper.max() - gripper.min()),
    }
    if episode.agent_pos is not None:
        moves = np.diff(episode.agent_pos[:, :3], axis=0)
        found["state_jump"] = float(np.linalg.norm(moves, axis=1).max())
        found["state_match"] = max(_correlation(episode.actions[:, :3].ravel(), moves.ravel(), 3 * lag) for lag in LAGS)
    return found


def luma(frames: np.ndarray) -> np.ndarray:
    """Luma (T, 96, 128) uint8 of frames (T, H, W, 3) uint8."""
    small = resize_frames(frames, *MEASURED)
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small])


def optical_flow(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where pixels go, (H, W, 2) pixels; a new estimator each time, since one that is kept remembers."""
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(before, after, None)  # ty: ignore


def _correlation(cause: np.ndarray, effect: np.ndarray, lag: int) -> float:
    """Pearson's r of what happens `lag` later with what caused it; 0 where one of them does not vary."""
    earlier, later = cause[: len(cause) - lag], effect[lag:]
    if len(earlier) < 3 or earlier.std() == 0 or later.std() == 0:
        return 0.0
    return float(np.corrcoef(earlier, later)[0, 1])
