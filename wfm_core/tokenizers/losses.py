"""Reconstruction losses for tokenizers."""

import torch
from torch import Tensor


def gradient_difference(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean weighted L1 between the spatial gradients of two (N, C, H, W) images; `weight` is (N, 1, H, W)."""
    error = prediction - target
    dx = (error[..., :, 1:] - error[..., :, :-1]).abs() * weight[..., :, 1:]
    dy = (error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]
    return dx.mean() + dy.mean()


def reconstruction_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """L1 + 2 L2 + 0.25 gradient difference, each weighted per pixel by `weight` (N, 1, H, W); images in [-1, 1]."""
    error = prediction - target
    pixel = ((error.abs() + 2 * error.square()) * weight).mean()
    return pixel + 0.25 * gradient_difference(prediction, target, weight)


def foreground_weight(frames: Tensor, background: Tensor, gain: float, threshold: float = 0.08) -> Tensor:
    """Weight 1 + gain where a frame differs from its background, 1 elsewhere.

    Args:
        frames: (N, 3, H, W) in [-1, 1].
        background: (N, 3, H, W) in [-1, 1].
        gain: extra weight of foreground pixels.
        threshold: mean absolute difference over channels from which a pixel is foreground.

    Returns:
        (N, 1, H, W) float.
    """
    difference = (frames - background).abs().mean(dim=1, keepdim=True)
    return 1 + gain * (difference > threshold).to(torch.float32)
