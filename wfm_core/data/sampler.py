"""Draw training clips: batch k is a pure function of the seed and k, so a resumed run sees the same batches."""

from collections.abc import Sequence

import numpy as np


def first_rows_of_clips(
    lengths: Sequence[int] | np.ndarray, clip_length: int, episodes: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """List the windows that fit into their episode.

    Args:
        lengths: (E,) frames of each episode, which lie end to end (`ClipCache.lengths`).
        clip_length: frames of a clip.
        episodes: indices of the episodes to take (a split); None takes all.

    Returns:
        (M,) int64, the first row of each.

    Raises:
        ValueError: no episode is long enough.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    chosen = np.arange(len(lengths)) if episodes is None else np.unique(np.asarray(episodes, dtype=np.int64))
    windows = [np.arange(starts[e], starts[e] + lengths[e] - clip_length + 1) for e in chosen]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *windows])
    if len(rows) == 0:
        raise ValueError(f"some episode must have at least {clip_length} frames, got at most {lengths.max(initial=0)}")
    return rows


class ClipSampler:
    """Draws clip positions, with replacement, from the windows that fit into their episode."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        clip_length: int,
        batch_size: int,
        seed: int,
        episodes: Sequence[int] | np.ndarray | None = None,
        sought: Sequence[np.ndarray] | None = None,
        sought_share: float = 0.0,
    ) -> None:
        """Prepare the table of windows.

        Args:
            lengths: (E,) frames of each episode, which lie end to end (`ClipCache.lengths`).
            clip_length: frames of a clip.
            batch_size: clips of a batch, B.
            seed: of the whole sequence of batches.
            episodes: indices of the episodes to draw from (a split); None draws from all.
            sought: (N,) bool in parts, rows that clips had better show, not as their first or last one.
            sought_share: fraction of the clips that are drawn from those alone that show one, if there are any.

        Raises:
            ValueError: no episode is long enough.
        """
        self.rows = first_rows_of_clips(lengths, clip_length, episodes)
        """(M,) int64, first row of every window that can be drawn."""
        self.seeking, self.sought_share = self.rows[:0], sought_share
        if sought is not None and sought_share:
            count = np.cumsum(np.pad(np.concatenate(list(sought)), (1, 0)))
            self.seeking = self.rows[count[self.rows + clip_length - 1] > count[self.rows + 1]]
        self.clip_length, self.batch_size, self.seed = clip_length, batch_size, seed

    def batch(self, step: int) -> np.ndarray:
        """Return the (B,) int64 first rows of batch number `step`, for `ClipCache.batch`."""
        rng = np.random.default_rng([self.seed, step])
        rows = self.rows[rng.integers(len(self.rows), size=self.batch_size)]
        if not len(self.seeking):
            return rows
        seeks = rng.random(self.batch_size) < self.sought_share
        return np.where(seeks, self.seeking[rng.integers(len(self.seeking), size=self.batch_size)], rows)
