"""What is measured of a clip, so that rules (`rules.py`) can tell what to keep: pure functions, one clip each.

Frames are measured at `MEASURED` pixels, whatever their size, so that one limit serves every resolution.
"""

import math
from collections.abc import Mapping

import cv2
import numpy as np

from wfm_core.data.episode import OWN_ACTIONS, Episode
from wfm_core.data.video import resize_frames

MEASURED = (96, 128)
"""Height and width at which frames are measured."""
DARK, BRIGHT = 20, 235
"""Mean luma, of 255, below and above which nothing is to be seen in a frame."""
STILL = 0.3
"""Mean change of luma, of 255, from one frame to the next, below which nothing has moved."""
LAGS = range(4)
"""Control steps by which pictures may trail commands."""
JUDGED = 16
"""Steps below which whatever is seen may fit commands by chance."""
FAR, MUCH, LITTLE = 3.0, 15.0, 200.0
"""Caps of a pixel's flow (pixels of the measured picture) and of its change (of 255), beyond which both are mistaken as
often as not, and the change of a picture, summed over its pixels, below which nothing is said to go anywhere."""
SEEN, FELT = 0.05, 1e-3
"""Moves, in pixels and m per step, that nobody asks commands to explain."""
FITTING, DELAY_STEP = 0.9, 0.25
"""Share of the steps in which an arm must go where it is told, and the grid of delays, in steps, that are tried."""
USUAL, FAINT = np.array([0.01] * 3 + [0.05] * 3 + [0.25]), 0.1
"""Ways of a step that are usual, m, rad and openness, and the share of the strongest pattern of ways (of the singular
values) below which a pattern is too faint to be held against a picture."""
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
        `frame_match`, of clips long enough to tell, how much of where things go in the picture a linear map of how arm
        and gripper moved explains (adjusted R^2), at the lag at which it is most: moved as they felt it, or, if they do
        not feel, as they were told; `idle`, the share of steps in which the arm is told nothing and nothing moves;
        `gripper_range`, of the commanded openness; and, of a robot that feels, `state_jump`, the longest way from one
        step to the next, m, and `state_match`, how much of the felt ways the commands explain, of an arm that follows
        them late and may be held up. Nothing of another robot's own actions, whatever they mean.
    """
    if episode.convention == OWN_ACTIONS or np.isnan(episode.actions).all() or len(episode.actions) < 2:
        return {}
    grey = luma(episode.frames)
    change = np.abs(np.diff(grey.astype(np.float32), axis=0)).mean(axis=(1, 2))
    still = (np.abs(episode.actions[:, :6]) < IDLE).all(axis=1) & (change < STILL)
    told, gripper = episode.actions[:, :3].astype(float), episode.actions[:, 6]
    found = {"idle": float(still.mean()), "gripper_range": float(gripper.max() - gripper.min())}
    moved = np.concatenate([told, np.diff(gripper, prepend=gripper[:1])[:, None]], axis=1) / USUAL[[0, 1, 2, 6]]
    if episode.agent_pos is not None:
        felt = np.diff(episode.agent_pos.astype(float), axis=0)
        found["state_jump"] = float(np.linalg.norm(felt[:, :3], axis=1).max())
        found["state_match"] = explained_ways(told, felt[:, :3])
        moved = felt / USUAL
    if len(told) >= JUDGED:
        found["frame_match"] = explained_motion(moved, motion(grey))
    return found


def luma(frames: np.ndarray) -> np.ndarray:
    """Luma (T, 96, 128) uint8 of frames (T, H, W, 3) uint8."""
    small = resize_frames(frames, *MEASURED)
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small])


def optical_flow(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where pixels go, (H, W, 2) pixels; a new estimator each time, since one that is kept remembers."""
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(before, after, None)  # ty: ignore


def motion(grey: np.ndarray) -> np.ndarray:
    """Say where what changes goes, on average, against the picture as a whole.

    Args:
        grey: (T + 1, H, W) uint8.

    Returns:
        (T, 2) float, pixels to the right and down.
    """
    means = np.zeros((len(grey) - 1, 2))
    for t, (before, after) in enumerate(zip(grey[:-1], grey[1:], strict=True)):
        flow = optical_flow(before, after)
        flow = flow - np.median(flow.reshape(-1, 2), axis=0)
        flow *= np.minimum(1, FAR / np.maximum(np.hypot(flow[..., 0], flow[..., 1]), FAR))[..., None]
        changed = np.minimum(cv2.absdiff(before, after), MUCH)
        means[t] = np.tensordot(changed, flow) / (changed.sum() + LITTLE)
    return means


def explained_motion(moved: np.ndarray, seen: np.ndarray) -> float:
    """Say how much of what moves in a picture a linear map of how an arm moved explains, at the best lag.

    Args:
        moved: (T, k) ways that it went or was told to go, in units of what is usual, T at least `JUDGED`.
        seen: (T, 2) from `motion`.

    Returns:
        Adjusted R^2: about 0 where they have nothing to do with each other, at most 1.
    """
    return max(_explained(moved, seen, lag) for lag in LAGS)


def explained_ways(told: np.ndarray, felt: np.ndarray) -> float:
    """Say how much of the ways that an arm felt its commands explain.

    An arm comes some time after its commands, which is found, and then goes where they point, at most as far as they
    say: what it meets may hold it up. The tenth of the steps that fit worst is left out.

    Args:
        told: (T, k) commanded ways, m, T >= 1.
        felt: (T, k) m.

    Returns:
        1 less the share of the squared ways that is not explained: 1 where all is, and where an arm neither moves nor
        is told to; about 0 where an arm that is told to move feels nothing.
    """
    count = math.ceil(FITTING * len(felt))
    floor = count * felt.shape[1] * FELT**2
    padded = np.concatenate([np.zeros((LAGS.stop, told.shape[1])), told])
    at = np.arange(LAGS.stop, len(padded))
    explained = []
    for delay in np.arange(0, LAGS[-1] + DELAY_STEP, DELAY_STEP):
        late = int(delay)
        led = padded[at - late] + (delay - late) * (padded[at - late - 1] - padded[at - late])
        along, length = (led * felt).sum(axis=1), (led**2).sum(axis=1)
        share = np.divide(along, length, out=np.zeros(len(felt)), where=length > 0).clip(0, 1)
        off = ((felt - share[:, None] * led) ** 2).sum(axis=1)
        kept = np.argsort(off, kind="stable")[:count]
        size = (felt[kept] ** 2).sum()
        ignored = max(min(length[kept].sum(), floor) - size, 0.0)
        explained.append(float(1 - (off[kept].sum() + ignored) / (size + floor)))
    return max(explained)


def _explained(moved: np.ndarray, seen: np.ndarray, lag: int) -> float:
    """How much of what is seen `lag` later a linear map of how an arm moved explains, less what it would by chance."""
    causes, effects = _centred(moved[: len(moved) - lag], seen[lag:])
    fit, _, rank, _ = np.linalg.lstsq(causes, effects, rcond=FAINT)
    unexplained = ((effects - causes @ fit) ** 2).sum() / ((effects**2).sum() + effects.size * SEEN**2)
    return float(1 - unexplained * (len(causes) - 1) / (len(causes) - 1 - rank))


def _centred(*series: np.ndarray) -> list[np.ndarray]:
    return [each - each.mean(axis=0) for each in series]
