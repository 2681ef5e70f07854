"""Orthonormal 2-D Haar wavelet transform, the front end of the tokenizers."""

import math

import torch
from einops import rearrange
from torch import Tensor


def haar2d(x: Tensor, levels: int = 1) -> Tensor:
    """Transform (N, C, H, W) to (N, 4**levels * C, H / 2**levels, W / 2**levels), orthonormal, so energy is preserved.

    Every output position depends only on its own 2**levels x 2**levels block of pixels.

    Raises:
        ValueError: H or W is not a multiple of 2**levels.
    """
    if x.shape[-1] % 2**levels or x.shape[-2] % 2**levels:
        raise ValueError(f"height and width must be multiples of {2**levels}, got {tuple(x.shape[-2:])}")
    for _ in range(levels):
        a, b, c, d = rearrange(x, "n c (h p) (w q) -> (p q) n c h w", p=2, q=2)
        x = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2
    return x


def inverse_haar2d(x: Tensor, levels: int = 1) -> Tensor:
    """Invert `haar2d`: (N, 4**levels * C, h, w) to (N, C, h * 2**levels, w * 2**levels)."""
    for _ in range(levels):
        s, u, v, w = x.chunk(4, dim=1)
        blocks = torch.stack([s + u + v + w, s - u + v - w, s + u - v - w, s - u - v + w]) / 2
        x = rearrange(blocks, "(p q) n c h w -> n c (h p) (w q)", p=2, q=2)
    return x


def haar3d(x: Tensor, levels: int, *, first: bool) -> Tensor:
    """Transform a video (B, T, C, H, W), or its next chunk, to (B, t, 8**levels * C, h, w), orthonormal.

    At a video's beginning its first frame is repeated, so that 1 + n * 2**levels frames become 1 + n.

    Raises:
        ValueError: T does not fit, or H or W is not a multiple of 2**levels.
    """
    if (x.shape[1] - first) % 2**levels:
        raise ValueError(f"frames must be {'1 + ' * first}a multiple of {2**levels}, got {x.shape[1]}")
    x = haar2d(x.flatten(0, 1), levels).unflatten(0, x.shape[:2])
    if first:
        x = torch.cat([x[:, :1].expand(-1, 2**levels - 1, -1, -1, -1), x], dim=1)
    for _ in range(levels):
        early, late = x[:, ::2], x[:, 1::2]
        x = torch.cat([early + late, early - late], dim=2) / math.sqrt(2)
    return x


def inverse_haar3d(x: Tensor, levels: int, *, first: bool) -> Tensor:
    """Invert `haar3d`: (B, t, 8**levels * C, h, w) to (B, T, C, H, W)."""
    for _ in range(levels):
        low, high = x.chunk(2, dim=2)
        x = torch.stack([low + high, low - high], dim=2).flatten(1, 2) / math.sqrt(2)
    x = inverse_haar2d(x.flatten(0, 1), levels).unflatten(0, x.shape[:2])
    return x[:, 2**levels - 1 :] if first else x
