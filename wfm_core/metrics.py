"""Video metrics. PSNR is always the mean of per-frame values, never the PSNR of a pooled error."""

import numpy as np


def psnr(frames: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame.

    Args:
        frames: (N, H, W, 3) uint8.
        truth: (N, H, W, 3) uint8, or broadcastable to it.
        mask: (N, H, W) bool, the pixels that count; None counts all. A frame without any gives NaN.

    Returns:
        (N,) float64 in dB; a perfect frame is capped at 60 dB.
    """
    squared = (frames.astype(np.float32) - truth.astype(np.float32)) ** 2
    error = squared.mean(axis=-1)
    if mask is None:
        mean = error.mean(axis=(1, 2), dtype=np.float64)
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (error * mask).sum(axis=(1, 2), dtype=np.float64) / mask.sum(axis=(1, 2))
    return -10 * np.log10(np.maximum(mean / 255**2, 1e-6))


def changed_fraction(tokens: np.ndarray, frames: np.ndarray, patch: int) -> float:
    """Fraction of unchanged patches whose tokens changed all the same (flicker of the tokenizer).

    Args:
        tokens: (T, n, C) integer tokens of consecutive frames, cells in row-major order.
        frames: (T, H, W, 3) uint8.
        patch: pixels a cell's side.

    Returns:
        In [0, 1]; NaN if every patch changed.
    """
    steps, height, width, _ = frames.shape
    same_pixel = (frames[1:] == frames[:-1]).all(axis=-1)
    blocks = same_pixel.reshape(steps - 1, height // patch, patch, width // patch, patch)
    same_patch = blocks.all(axis=(2, 4)).reshape(steps - 1, -1)
    flipped = (tokens[1:] != tokens[:-1]).any(axis=-1)
    return float((flipped & same_patch).sum() / same_patch.sum()) if same_patch.any() else float("nan")
