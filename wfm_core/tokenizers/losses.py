"""Reconstruction losses for tokenizers."""

from torch import Tensor


def reconstruction_loss(error: Tensor, weight: Tensor) -> Tensor:
    """L1 + 2 L2 + 0.25 L1 of spatial gradients, each weighted per pixel.

    Args:
        error: (N, C, H, W), prediction less target, images in [-1, 1].
        weight: (N, 1, H, W) >= 0.

    Returns:
        Scalar.
    """
    # Channels are averaged before weighting: at full resolution every avoided pass over the image counts.
    pixel = ((error.abs() + 2 * error.square()).mean(dim=1, keepdim=True) * weight).mean()
    dx = (error[..., :, 1:] - error[..., :, :-1]).abs().mean(dim=1, keepdim=True) * weight[..., :, 1:]
    dy = (error[..., 1:, :] - error[..., :-1, :]).abs().mean(dim=1, keepdim=True) * weight[..., 1:, :]
    return pixel + 0.25 * (dx.mean() + dy.mean())


def foreground_mask(frames: Tensor, background: Tensor, threshold: float = 10.0) -> Tensor:
    """Where a frame differs from its background.

    Args:
        frames: (N, H, W, 3) uint8.
        background: (N, H, W, 3) uint8.
        threshold: mean absolute difference over channels (of 255) above which a pixel is foreground.

    Returns:
        (N, 1, H, W) bool.
    """
    difference = (frames.short() - background.short()).abs().sum(dim=-1)
    return (difference > 3 * threshold)[:, None]
