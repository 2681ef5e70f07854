"""Find burnt-in text, captions and watermarks, without a network: strokes that form rows of letters and stay."""

import cv2
import numpy as np

LOOKS = 5
"""Pictures of a clip whose median is looked at: what moves fades, what was burnt in stays."""
STROKE = 17 / 480
"""Widest stroke of a letter, of the picture's height."""
THRESHOLDS = (40, 70, 110)
"""Contrasts, of 255, of a stroke and what is around it, each tried: letters merge at some and break at others."""
LETTER = 11 / 480, 75 / 480
"""Least and greatest height of a letter, of the picture's height."""
WIDEST, FAINTEST = 1.7, 1 / 12
"""Greatest width of a letter, in its heights, and least share of its box that it covers."""
GAP, BASELINE, TALLER = 1.3, 0.08, 1.9
"""Between two letters of a row: the widest gap and the greatest step of the baseline, in heights of the taller one,
and how many times as tall it may be."""
CROWD = 500
"""Strokes beyond which a picture is texture and no writing can be told in it."""


def count_letters(frames: np.ndarray) -> int:
    """Number of letters in the longest row of what looks like text in all of the pictures.

    Args:
        frames: (N, H, W, 3) uint8 of one clip, N >= 1, evenly spread over it; H of a few hundred pixels.
    """
    chosen = np.linspace(0, len(frames) - 1, min(LOOKS, len(frames))).round().astype(int)
    picture = np.median(frames[chosen], axis=0).astype(np.uint8)
    side = round(STROKE * len(picture)) | 1
    stroke = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    # Red letters on grey have no contrast in luma, so each colour is looked at by itself.
    return max(
        _longest_row(cv2.morphologyEx(plane, operation, stroke), threshold)
        for plane in map(np.ascontiguousarray, np.moveaxis(picture, -1, 0))
        for operation in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT)  # bright letters, dark letters
        for threshold in THRESHOLDS
    )


def _longest_row(contrast: np.ndarray, threshold: int) -> int:
    from scipy.sparse.csgraph import connected_components  # slow to import, and not needed for episodes

    _, _, boxes, _ = cv2.connectedComponentsWithStats((contrast > threshold).astype(np.uint8))
    x, _, w, h, area = boxes[1:].T.astype(float)
    bottom = boxes[1:, cv2.CC_STAT_TOP] + h
    least, most = LETTER[0] * len(contrast), LETTER[1] * len(contrast)
    letters = (h >= least) & (h <= most) & (w <= WIDEST * h) & (area >= FAINTEST * w * h)
    if not 1 < letters.sum() <= CROWD:
        return 0
    x, w, h, bottom = (each[letters] for each in (x, w, h, bottom))
    taller, smaller = np.maximum(h[:, None], h), np.minimum(h[:, None], h)
    gap = np.maximum(x[:, None], x) - np.minimum((x + w)[:, None], x + w)
    step = np.abs(bottom[:, None] - bottom)
    near = (gap < GAP * taller) & (gap > -0.4 * np.minimum(w[:, None], w) - 1)  # side by side, not one upon the other
    row = near & (step <= np.maximum(BASELINE * taller, 1.5)) & (taller <= TALLER * smaller)
    _, rows = connected_components(row)
    # A chain of small steps is a slope, not a line: only what is at the height of most of it counts.
    sizes = np.bincount(rows)
    longest = 0
    for k in np.flatnonzero(sizes > max(longest, 2)):
        among = bottom[rows == k]
        level = np.abs(among - np.median(among)) <= max(1.5, BASELINE * float(np.median(h[rows == k])))
        longest = max(longest, int(level.sum()))
    return longest
