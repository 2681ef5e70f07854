"""Video metrics. PSNR is always the mean of per-frame values, never the PSNR of a pooled error."""

import numpy as np
from skimage.metrics import structural_similarity

RESAMPLES = 2000
"""Of a bootstrap."""


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


def ssim(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame, with the Gaussian window of the paper.

    Args:
        frames: (N, H, W, 3) uint8.
        truth: (N, H, W, 3) uint8.

    Returns:
        (N,) float64, at most 1.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (TIP 2004).
    """
    as_published = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return np.array(
        [structural_similarity(a, b, channel_axis=-1, **as_published) for a, b in zip(frames, truth, strict=True)]
    )


def flicker(frames: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute error of the change from frame to frame, of 255: what shimmers though each frame may look right.

    Args:
        frames: (T, H, W, 3) uint8, consecutive.
        truth: (T, H, W, 3) uint8.
    """
    changes = [np.diff(video.astype(np.int16), axis=0) for video in (frames, truth)]
    return float(np.abs(changes[0] - changes[1]).mean())


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared 2-Wasserstein distance between normal distributions fitted to two sets of features.

    Args:
        first: (N, D) features, N >= 2.
        second: (M, D) features, M >= 2.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (NeurIPS 2017), equation 6.
    """
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)  # has the eigenvalues of the product of both
    means = first.mean(axis=0) - second.mean(axis=0)
    return float(means @ means + sum(np.trace(c) for c in covariances) - 2 * np.sqrt(product.clip(min=0)).sum())


def level_use(indices: np.ndarray, levels: tuple[int, ...]) -> float:
    """How evenly FSQ's levels are used: entropy over the largest possible, averaged over dimensions.

    Args:
        indices: (..., C) level indices.
        levels: C numbers of levels.

    Returns:
        In [0, 1]; 1 if every level of every dimension is as frequent as any other.
    """
    entropies = []
    for column, size in zip(indices.reshape(-1, len(levels)).T, levels, strict=True):
        share = np.bincount(column, minlength=size) / column.size
        entropies.append(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(size))
    return float(np.mean(entropies))


def mean_interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of values (N,), which are resampled one by one."""
    means = rng.choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
