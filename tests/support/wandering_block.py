"""Clip caches of a block that wanders over a still background, the last pixel of each frame telling which it is."""

from pathlib import Path

import numpy as np

from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode

SCENES = {"left": 60, "right": 180}  # instruction -> brightness of its background
LENGTHS = {0: 30, 1: 31, 2: 32, 3: 33, 5: 40}  # of the episodes of `make_caches`; the last has a cache of its own


def make_episode(index: int, length: int = 0) -> Episode:
    """A 4 x 4 block wanders over a still background; the last pixel tells the frame."""
    length = length or LENGTHS[index]
    rng = np.random.default_rng(index)
    instruction = list(SCENES)[index % 2]
    frames = np.full((length, 32, 32, 3), SCENES[instruction], dtype=np.uint8)
    for t in range(length):
        row, column = rng.integers(0, 28, 2)
        frames[t, row : row + 4, column : column + 4] = rng.integers(0, 256, 3)
        frames[t, 31, 31] = (index, t, 0)
    return Episode(
        frames=frames,
        actions=rng.normal(size=(length - 1, 7)).astype(np.float32),
        agent_pos=None,
        instruction=instruction,
        episode_id=str(index),
        convention="commanded",
        command_lag=0,
        labels={
            "grasped": np.full(length, -1),
            "object_positions": np.zeros((length, 6), dtype=np.float32),
        },
    )


def make_caches(folder: Path) -> list[ClipCache]:
    """Two caches, of four episodes and of one."""
    *most, last = LENGTHS
    first = build_clip_cache(map(make_episode, most), folder / "a")
    return [first, build_clip_cache([make_episode(last)], folder / "b")]
