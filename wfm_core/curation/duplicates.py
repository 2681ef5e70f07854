"""Find clips that are there twice, at whatever size and encoding."""

from collections.abc import Sequence

import cv2
import imagehash
import numpy as np
from PIL import Image

from wfm_core.curation.measures import luma

LOOKS = 4
"""Moments of a clip at which it is looked at."""
ALIKE = 0.12
"""Share of a fingerprint's bits up to which two clips are the same one."""
TRIMMED = 2
"""Frames by which copies may differ in length: some layouts drop the first or the last one."""


def fingerprint(frames: np.ndarray) -> np.ndarray:
    """Describe a clip by bits that sizes, encodings and slight changes of light hardly touch.

    A robot's camera stands still, so different episodes look alike but for what moves: beside the perceptual hash of
    the first frame there are those of what has changed since then, at `LOOKS` moments.

    Args:
        frames: (T, H, W, 3) uint8.

    Returns:
        (LOOKS + 1) * 8 bytes uint8.

    Source: the perceptual hash is that of the ImageHash library: signs of low frequencies against their median.
    """
    grey = luma(frames).astype(np.float32)
    moments = np.linspace(0, len(grey) - 1, LOOKS + 1).round().astype(int)[1:]
    changes = [cv2.GaussianBlur(np.abs(grey[moment] - grey[0]), (0, 0), 2) for moment in moments]
    pictures = [grey[0], *(np.clip(4 * change, 0, 255) for change in changes)]
    bits = [imagehash.phash(Image.fromarray(picture.astype(np.uint8))).hash for picture in pictures]
    return np.packbits(np.stack(bits).reshape(-1))


def duplicates(
    prints: np.ndarray, lengths: Sequence[float], preference: Sequence[float], limit: float = ALIKE
) -> dict[int, int]:
    """Say which clips are copies of which others.

    Args:
        prints: (N, bytes) uint8, of `fingerprint`.
        lengths: N, frames; copies differ by no more than `TRIMMED`.
        preference: N; of copies the one with the highest is kept, of equals the first.
        limit: share of differing bits up to which two are the same.

    Returns:
        Copy -> the clip that is kept instead of it.
    """
    most = limit * 8 * prints.shape[1] if len(prints) else 0
    frames = np.asarray(lengths)
    kept: list[int] = []
    copies: dict[int, int] = {}
    for k in sorted(range(len(prints)), key=lambda k: (-preference[k], k)):
        apart = np.bitwise_count(prints[kept] ^ prints[k]).sum(axis=1, dtype=float)
        apart[np.abs(frames[kept] - frames[k]) > TRIMMED] = np.inf
        if kept and apart.min() <= most:
            copies[k] = kept[int(apart.argmin())]
        else:
            kept.append(k)
    return copies
