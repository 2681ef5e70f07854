"""Layers of the video tokenizers, causal in time: a frame's output depends on that frame and earlier ones only.

Videos are (B, T, C, H, W), so that a layer that looks at one frame at a time sees a plain batch of images. Every layer
that looks back keeps what it will need of a chunk (`Past`), so a video may come in pieces and gives the same as whole.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from wfm_core.models.blocks import attend

Past = dict[nn.Module, Tensor]
"""What each layer remembers of the chunks before; empty at the beginning of a video."""


def over_frames(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a transform of images (N, C, H, W) to every frame of (B, T, C, H, W)."""
    return transform(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ChannelNorm(nn.Module):
    """RMS norm over the channels of (B, T, C, H, W) at each position, so that no frame's statistics reach another."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor, _: Past) -> Tensor:
        """Map (B, T, C, H, W) to the same shape."""
        return x * ((x.square().mean(dim=2, keepdim=True) + 1e-6).rsqrt() * self.scale)


class SpaceConv(nn.Module):
    """2-D convolution of every frame."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, padding=kernel // 2)

    def forward(self, x: Tensor, _: Past) -> Tensor:
        """Map (B, T, C, H, W) to (B, T, C', H / stride, W / stride)."""
        return over_frames(self.conv, x)


class TimeConv(nn.Module):
    """Convolution along time, padded on the left: with the chunk before, or by repeating the first frame.

    With `stride` 2 a video of 1 + 2 n frames becomes 1 + n. At first the newest frame passes as it is: a video
    tokenizer begins as an image tokenizer.
    """

    def __init__(self, dim: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        if kernel <= stride:
            raise ValueError(f"kernel must be larger than stride, got {kernel} and {stride}")
        self.kernel, self.stride = kernel, stride
        # Of the last `kernel` frames, the oldest first. The convolutions in space on either side have biases.
        self.mix = nn.Conv2d(kernel * dim, dim, 1, bias=False)
        with torch.no_grad():
            self.mix.weight.mul_(0.1)[:, -dim:, 0, 0] += torch.eye(dim)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Map (B, T, C, H, W) to (B, T', C, H, W)."""
        left = past[self] if self in past else repeat(x[:, :1], "b 1 c h w -> b n c h w", n=self.kernel - 1)
        padded = torch.cat([left, x], dim=1)
        past[self] = padded[:, -(self.kernel - self.stride) :]
        last = padded.shape[1] - self.kernel
        seen = [padded[:, k : last + k + 1 : self.stride] for k in range(self.kernel)]
        return over_frames(self.mix, torch.cat(seen, dim=2))


class ResidualBlock(nn.Module):
    """Norm, convolution in space, then (video) in time, twice, beside a skip connection."""

    def __init__(self, dim: int, *, video: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ChannelNorm(dim), ChannelNorm(dim)])
        self.space = nn.ModuleList([SpaceConv(dim, dim), SpaceConv(dim, dim)])
        self.time = nn.ModuleList([TimeConv(dim), TimeConv(dim)] if video else [])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Map (B, T, C, H, W) to the same shape."""
        y = x
        for i, (norm, space) in enumerate(zip(self.norms, self.space, strict=True)):
            y = space(F.silu(norm(y, past)), past)
            if self.time:
                y = self.time[i](y, past)
        return x + y


class SpaceAttention(nn.Module):
    """Self-attention over the positions of each frame."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = ChannelNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Map (B, T, C, H, W) to the same shape."""
        rows = rearrange(self.norm(x, past), "b t c h w -> b t (h w) c")
        q, k, v = rearrange(self.qkv(rows), "b t n (three a d) -> three b t a n d", three=3, a=self.num_heads)
        y = self.out(rearrange(attend(q, k, v), "b t a n d -> b t n (a d)"))
        return x + rearrange(y, "b t (h w) c -> b t c h w", h=x.shape[-2])


class TimeAttention(nn.Module):
    """Causal self-attention at each position over its last `window` frames, with a learned bias per distance."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.norm = ChannelNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, window))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Map (B, T, C, H, W) to the same shape."""
        time, height = x.shape[1], x.shape[3]
        rows = rearrange(self.norm(x, past), "b t c h w -> b (h w) t c")
        q, k, v = rearrange(self.qkv(rows), "b n t (three a d) -> three b n a t d", three=3, a=self.num_heads)
        if self in past:
            k, v = torch.cat([past[self], torch.stack([k, v])], dim=-2)
        past[self] = torch.stack([k, v])[..., max(0, k.shape[-2] - self.window + 1) :, :]
        since = torch.arange(k.shape[-2], device=x.device)
        distance = since[-time:, None] - since
        bias = self.distance_bias[:, distance.clamp(0, self.window - 1)]
        bias = bias.masked_fill((distance < 0) | (distance >= self.window), -math.inf)
        y = self.out(rearrange(attend(q, k, v, bias), "b n a t d -> b n t (a d)"))
        return x + rearrange(y, "b (h w) t c -> b t c h w", h=height)


class Downsample(nn.Module):
    """Halve space, and time if asked: a strided convolution plus the average of what it replaces."""

    def __init__(self, in_dim: int, out_dim: int, *, time: bool) -> None:
        super().__init__()
        self.time = TimeConv(in_dim, stride=2) if time else None
        self.space = SpaceConv(in_dim, out_dim, stride=2)
        self.skip = SpaceConv(in_dim, out_dim, kernel=1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Map (B, T, C, H, W) to (B, T', C', H / 2, W / 2); T' = T, or (1 + T) / 2 at a video's beginning."""
        if self.time is not None:
            pairs = x if self.time in past else torch.cat([x[:, :1], x], dim=1)
            x = self.time(x, past) + (pairs[:, ::2] + pairs[:, 1::2]) / 2
        return self.space(x, past) + self.skip(over_frames(lambda images: F.avg_pool2d(images, 2), x), past)


class Upsample(nn.Module):
    """Double space, and time if asked: repetition, then a convolution."""

    def __init__(self, in_dim: int, out_dim: int, *, time: bool) -> None:
        super().__init__()
        self.time = TimeConv(in_dim) if time else None
        self.space = SpaceConv(in_dim, out_dim)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Map (B, T, C, H, W) to (B, T', C', 2 H, 2 W); T' = T, or 2 T - 1 at a video's beginning."""
        if self.time is not None:
            doubled = x.repeat_interleave(2, dim=1)
            x = doubled if self.time in past else doubled[:, 1:]
            x = x + self.time(x, past)
        return self.space(repeat(x, "b t c h w -> b t c (h p) (w q)", p=2, q=2), past)


class Chain(nn.ModuleList):
    """Layers one after the other, each with what it remembers."""

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Map (B, T, C, H, W) to (B, T', C', H', W')."""
        for layer in self:
            x = layer(x, past)
        return x
