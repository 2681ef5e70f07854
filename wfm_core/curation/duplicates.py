"""Find clips that are there twice, at whatever size and encoding."""

from collections.abc import Sequence

import cv2
import numpy as np

from wfm_core.curation.measures import luma

LOOKS = 5
"""Moments of a clip at which it is looked at."""
GRID = (12, 16)
"""Rows and columns of cells whose brightness is kept."""
APART = 16
"""Difference of a cell's luma, of 255, beyond which something else is to be seen in it."""
ALIKE = 0.007
"""Share of a fingerprint's cells in which something else may be seen in two clips that are the same one."""
TRIMMED = 2
"""Frames by which copies may differ in length: some layouts drop the first or the last one."""


def fingerprint(frames: np.ndarray) -> np.ndarray:
    """Describe a clip by what sizes, encodings and changes of light hardly touch: small pictures of some moments.

    A robot's camera stands still, so that pictures of different episodes differ in few cells, but in these by much.

    Args:
        frames: (T, H, W, 3) uint8.

    Returns:
        `LOOKS` * 12 * 16 uint8, the luma of each cell against its picture's mean, from 128.
    """
    moments = np.linspace(0, len(frames) - 1, LOOKS).round().astype(int)
    grey = luma(frames[moments]).astype(np.float32)
    cells = np.stack([cv2.resize(picture, GRID[::-1], interpolation=cv2.INTER_AREA) for picture in grey])
    against = cells - cells.mean(axis=(1, 2), keepdims=True)
    return (128 + against).round().clip(0, 255).astype(np.uint8).reshape(-1)


def difference(prints: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Share of cells (...) in which clips with fingerprints (..., cells) show something else than that of `one`."""
    return (np.maximum(prints, one) - np.minimum(prints, one) > APART).mean(axis=-1)


def duplicates(
    prints: np.ndarray, lengths: Sequence[float], preference: Sequence[float], limit: float = ALIKE
) -> dict[int, int]:
    """Say which clips are copies of which others.

    Args:
        prints: (N, cells) uint8, of `fingerprint`.
        lengths: N, frames; copies differ by no more than `TRIMMED`.
        preference: N; of copies the one with the highest is kept, of equals the first.
        limit: share of differing cells up to which two are the same.

    Returns:
        Copy -> the clip that is kept instead of it.
    """
    frames = np.asarray(lengths)
    kept = np.zeros(len(prints), bool)
    copies: dict[int, int] = {}
    for k in sorted(range(len(prints)), key=lambda k: (-preference[k], k)):
        others = np.flatnonzero(kept & (np.abs(frames - frames[k]) <= TRIMMED))
        apart = difference(prints[others], prints[k])
        if len(others) and apart.min() <= limit:
            copies[k] = int(others[apart.argmin()])
        else:
            kept[k] = True
    return copies
