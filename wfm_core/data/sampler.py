"""Draw training clips: batch k is a pure function of the seed and k, so a resumed run sees the same batches."""

from collections.abc import Sequence

import numpy as np


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
        weights: np.ndarray | None = None,
    ) -> None:
        """Prepare the table of windows.

        Args:
            lengths: (E,) frames of each episode, which lie end to end (`ClipCache.lengths`).
            clip_length: frames of a clip.
            batch_size: clips of a batch, B.
            seed: of the whole sequence of batches.
            episodes: indices of the episodes to draw from (a split); None draws from all.
            weights: (N,) >= 0, one a frame; a window is drawn in proportion to their mean over its frames. None draws
                every window alike.

        Raises:
            ValueError: no episode is long enough, or weights have the wrong shape, are negative or not finite, or are 0
                in every window.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        chosen = np.arange(len(lengths)) if episodes is None else np.unique(np.asarray(episodes, dtype=np.int64))
        windows = [np.arange(starts[e], starts[e] + lengths[e] - clip_length + 1) for e in chosen]
        self.rows = np.concatenate([np.empty(0, dtype=np.int64), *windows])
        """(M,) int64, first row of every window that can be drawn."""
        if len(self.rows) == 0:
            raise ValueError(
                f"some episode must have at least {clip_length} frames, got at most {lengths.max(initial=0)}"
            )
        self.clip_length, self.batch_size, self.seed = clip_length, batch_size, seed
        self._cumulative: np.ndarray | None = None
        if weights is not None:
            weights = np.asarray(weights, dtype=np.float64)
            if weights.shape != (int(lengths.sum()),) or not np.isfinite(weights).all() or (weights < 0).any():
                raise ValueError(f"weights must be ({int(lengths.sum())},), finite and >= 0, got shape {weights.shape}")
            total = np.concatenate([[0.0], np.cumsum(weights)])
            self._cumulative = np.cumsum(np.maximum(total[self.rows + clip_length] - total[self.rows], 0.0))
            if self._cumulative[-1] <= 0:
                raise ValueError("weights must be positive in some window, got 0 everywhere")

    def batch(self, step: int) -> np.ndarray:
        """Return the (B,) int64 first rows of batch number `step`, for `ClipCache.batch`."""
        rng = np.random.default_rng([self.seed, step])
        if self._cumulative is None:
            return self.rows[rng.integers(len(self.rows), size=self.batch_size)]
        draws = rng.random(self.batch_size) * self._cumulative[-1]
        return self.rows[np.searchsorted(self._cumulative, draws, side="right").clip(max=len(self.rows) - 1)]
