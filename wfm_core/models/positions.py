"""Where a token is, in time, down and to the right: rotary and sinusoidal embeddings with three axes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NATIVE_FPS = 5.0
"""Frames a second at which the time axis counts one a frame."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of three axes.

    The pairs of a head's dimensions are shared out: a third each to the two axes of space, the rest to time. With
    `extension` above 1 the time axis is stretched to clips that many times as long as those of training, which had
    `trained_frames`, by YaRN: pairs that turn more than `fast_turns` times within a training clip stay as they are,
    those that turn less than `slow_turns` times are slowed down by `extension`, those between by something between.

    Source: Su et al., "RoFormer" (2021); Peng et al., "YaRN" (ICLR 2024), section 3.2; the shares, and YaRN on time
    alone, are from NVIDIA, "Cosmos World Foundation Model Platform for Physical AI" (2025), section 5.2.
    """

    theta: float = 10_000.0
    extension: float = 1.0
    trained_frames: int = 17
    fast_turns: float = 4.0
    slow_turns: float = 1.0

    def __post_init__(self) -> None:
        if self.extension < 1:
            raise ValueError(f"extension must be at least 1, got {self.extension}")
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(f"slow_turns must lie in (0, fast_turns), got {self.slow_turns} and {self.fast_turns}")

    @property
    def longest(self) -> float:
        """Frames at the native rate that are covered; what is older keeps the distance of the oldest."""
        return self.trained_frames * self.extension

    def check_span(self, num_frames: int, fps: Tensor | None) -> None:
        """Check that clips of so many frames are covered at their frame rates (B,), or at the native one.

        Raises:
            ValueError: they are longer.
        """
        span = (num_frames - 1) * (1 if fps is None else NATIVE_FPS / float(fps.min()))
        if span > self.longest - 1:
            raise ValueError(
                f"a clip must span at most {self.longest:g} frames at {NATIVE_FPS:g} Hz, got {span + 1:g}: raise "
                "rope.extension, or rope.trained_frames for a model that begins"
            )


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Dimensions of a head that belong to time, height and width; each even.

    Raises:
        ValueError: head_dim is odd or below 6.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim must be even and at least 6, got {head_dim}")
    space = head_dim // 6 * 2
    return head_dim - 2 * space, space, space


def frequencies(head_dim: int, config: RopeConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Radians a step along time, height and width, one for each pair of dimensions, float32."""
    time, height, width = (config.theta ** -(torch.arange(0, dim, 2) / dim) for dim in axis_dims(head_dim))
    turns = time * config.trained_frames / (2 * math.pi)
    slowed = ((config.fast_turns - turns) / (config.fast_turns - config.slow_turns)).clamp(0, 1)
    return time * (1 - slowed) + time / config.extension * slowed, height, width


def attention_scale(config: RopeConfig) -> float:
    """Factor on queries and keys of an extended model: longer contexts spread attention thinner (YaRN, section 3.3)."""
    return 0.1 * math.log(config.extension) + 1


def rotations(positions: Tensor, head_dim: int, config: RopeConfig, fps: float = NATIVE_FPS) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which a token's queries and keys are turned.

    Args:
        positions: (..., 3) frame, row and column of each token; frames may be fractions.
        head_dim: of the attention heads.
        config: see there.
        fps: frames a second of the clip: at half the rate a frame is twice as far from the next.

    Returns:
        Two tensors (..., head_dim / 2) float32.

    Raises:
        ValueError: fps is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    step = positions.new_tensor([NATIVE_FPS / fps, 1, 1], dtype=torch.float32)
    scaled = positions.float() * step
    axes = frequencies(head_dim, config)
    angles = torch.cat([scaled[..., i : i + 1] * axis.to(positions.device) for i, axis in enumerate(axes)], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (i, i + d / 2) of the last dimension of x (..., d) by its angle (..., d / 2)."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    return torch.cat([first * cosines - second * sines, first * sines + second * cosines], dim=-1)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Absolute embedding (..., dim) float32 of positions (..., 3): sines and cosines, a third of `dim` for each axis.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5, axis by axis.

    Raises:
        ValueError: dim is not a multiple of 6.
    """
    if dim % 6:
        raise ValueError(f"dim must be a multiple of 6, got {dim}")
    each = dim // 3
    wave = 10_000 ** -(torch.arange(0, each, 2, device=positions.device) / each)
    angles = positions.float()[..., None] * wave  # (..., 3, each / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def bounded_sinusoids(positions: Tensor, dim: int, config: RopeConfig) -> Tensor:
    """As `sinusoids`, but of no later frame than those of training: how far two are apart is the rotations' business.

    So long rollouts stay within what was trained.
    """
    oldest = positions.new_tensor([config.trained_frames - 1, math.inf, math.inf], dtype=torch.float32)
    return sinusoids(positions.float().minimum(oldest), dim)
