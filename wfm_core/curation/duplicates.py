"""Find clips that are there twice, at whatever size and encoding."""

from collections.abc import Iterator, Sequence
from itertools import chain

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
TELLING = 48
"""Cells, those that vary most, that are compared first."""
SMALL, SAMPLE = 128, 64
"""Clips that are not parted further, and by how many of them a border is chosen."""
WORTHWHILE = 0.8
"""Share of the comparisons that may be left where a part is halved."""
MOST_GROUPS = 16
"""Of cells; where more may differ, parts are by length alone."""


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

    A clip is compared with those that share a part with it, of several ways to part them; no copy escapes: of all
    `_ways` at least one looks at none of the few cells in which the two differ.

    Args:
        prints: (N, cells) uint8, of `fingerprint`.
        lengths: N, frames; copies differ by no more than `TRIMMED`.
        preference: N; of copies the one with the highest is kept, of equals the first.
        limit: share of differing cells up to which two are the same.

    Returns:
        Copy -> the clip that is kept instead of it.
    """
    if limit < 0 or len(prints) < 2:
        return {}
    frames, cells = np.asarray(lengths, float), prints.shape[1]
    allowed = int(np.flatnonzero(np.arange(cells + 1) / cells <= limit)[-1])
    telling = np.ascontiguousarray(prints[:, np.argsort(-prints.std(axis=0), kind="stable")[:TELLING]])
    parts_of: list[list[list[int]]] = [[] for _ in prints]  # of each clip, the kept ones of each part
    for part in _parts(prints, frames, allowed):
        shared: list[int] = []
        for k in part:
            parts_of[k].append(shared)
    copies: dict[int, int] = {}
    for k in sorted(range(len(prints)), key=lambda k: (-preference[k], k)):
        others = np.unique(np.fromiter(chain.from_iterable(parts_of[k]), int))
        others = others[np.abs(frames[others] - frames[k]) <= TRIMMED]
        others = others[_differing(telling[others], telling[k]) <= allowed]  # a first look at few cells spares most
        apart = difference(prints[others], prints[k])
        if len(others) and apart.min() <= limit:
            copies[k] = int(others[apart.argmin()])
        else:
            for shared in parts_of[k]:
                shared.append(k)
    return copies


def _differing(prints: np.ndarray, one: np.ndarray) -> np.ndarray:
    return np.count_nonzero(np.maximum(prints, one) - np.minimum(prints, one) > APART, axis=-1)


def _parts(prints: np.ndarray, frames: np.ndarray, allowed: int) -> Iterator[list[int]]:
    """Parts, of which two clips share one if they differ in no more than `allowed` cells and `TRIMMED` frames.

    Of one more groups of cells than may differ, one has none that does.
    """
    everything = np.random.default_rng(0).permutation(len(prints))
    columns = np.ascontiguousarray(prints.T)
    for near in _overlapping(frames[None], everything, 1.001 * TRIMMED):  # sums of floats may be off
        if allowed >= MOST_GROUPS:
            yield near.tolist()
            continue
        for first in range(allowed + 1):
            for part in _overlapping(columns[first :: allowed + 1], near, APART):
                yield part.tolist()


def _overlapping(columns: np.ndarray, members: np.ndarray, reach: float) -> Iterator[np.ndarray]:
    """Part `members` so that two who differ by no more than `reach` in every one of (C, N) columns share a part.

    They are halved where few are near the border, of which those are in both halves, as long as that helps.
    """
    waiting = [members]
    while waiting:
        members = waiting.pop()
        if len(members) > SMALL:
            sample = np.sort(columns[:, members[:SAMPLE]], axis=1).astype(float)
            places = (sample.shape[1] * np.array([0.3, 0.4, 0.5, 0.6, 0.7])).astype(int)
            borders = sample[:, places] - reach / 2  # (C, 5)
            below = (sample[:, None] <= borders[..., None] + reach).mean(axis=-1)
            above = (sample[:, None] > borders[..., None]).mean(axis=-1)
            column, place = np.unravel_index((below**2 + above**2).argmin(), borders.shape)
            values, border = columns[column, members], borders[column, place]
            halves = members[values <= border + reach], members[values > border]
            if sum(len(half) ** 2 for half in halves) < WORTHWHILE * len(members) ** 2:
                waiting += halves
                continue
        yield members
