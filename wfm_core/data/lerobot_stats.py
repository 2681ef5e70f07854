"""Statistics of a data set as LeRobot keeps them, of an episode or of all."""

from collections.abc import Mapping, Sequence

import numpy as np

IMAGE_STATS_EVERY = 5  # frames; pixel statistics of one in five frames
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def column_stats(tables: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict[str, list]]:
    """Compute exact statistics of every column, (N, ...) numbers or bool, over the rows of all tables."""
    stats = {}
    for name in tables[0]:
        value = np.concatenate([table[name] for table in tables]).astype(np.float64)
        value = value.reshape(len(value), -1)
        entry = {"min": value.min(0), "max": value.max(0), "mean": value.mean(0), "std": value.std(0)}
        entry |= dict(zip(_QUANTILES, np.quantile(value, list(_QUANTILES.values()), axis=0), strict=True))
        stats[name] = {stat: array.tolist() for stat, array in entry.items()} | {"count": [len(value)]}
    return stats


def image_stats(histogram: np.ndarray, num_frames: int) -> dict[str, list]:
    """Compute statistics per channel, shape (3, 1, 1), of pixel values in [0, 1] from what `pixel_histogram` gave."""
    levels = np.arange(256) / 255
    total = histogram.sum(1)
    mean = histogram @ levels / total
    cumulative = np.cumsum(histogram, axis=1) / total[:, None]
    entry = {
        "min": np.array([levels[np.flatnonzero(channel)[0]] for channel in histogram]),
        "max": np.array([levels[np.flatnonzero(channel)[-1]] for channel in histogram]),
        "mean": mean,
        "std": np.sqrt(np.maximum(histogram @ levels**2 / total - mean**2, 0)),
    }
    entry |= {name: levels[(cumulative >= q - 1e-12).argmax(1)] for name, q in _QUANTILES.items()}
    return {stat: array.reshape(3, 1, 1).tolist() for stat, array in entry.items()} | {"count": [num_frames]}


def pixel_histogram(frames: np.ndarray) -> np.ndarray:
    """Count pixel values, (3, 256) int64, in a sample of frames (T, H, W, 3) uint8; those of several videos add up."""
    sample = frames[::IMAGE_STATS_EVERY].reshape(-1, 3)
    return np.stack([np.bincount(sample[:, channel], minlength=256) for channel in range(3)])
