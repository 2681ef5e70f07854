"""Transformer blocks for clips (batch, time, cell): attention over the cells of a frame, or over time at a cell."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class MLP(nn.Module):
    """Position-wise network (..., D) -> (..., D); squared ReLU, a third of GELU's cost on a CPU in bfloat16."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, ratio * dim)
        self.rectify: nn.Module = nn.ReLU()
        self.down = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down(self.rectify(self.up(x)).square())


HAS_TILES = torch.cpu._is_amx_tile_supported()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention: q (..., n, d), k and v (..., m, d), additive bias broadcastable to (..., n, m).

    On a CPU the fused kernel is the faster one only with matrix tiles (AMX) and without gradients: there by a tenth to
    a half, elsewhere it takes up to three times as long as plain products, and backward up to seven.
    """
    if q.is_cuda or (HAS_TILES and (bias is None or q.ndim == 4) and not q.requires_grad):
        if bias is None and q.ndim > 4:  # the fused kernel of a CPU takes four dimensions
            mixed = F.scaled_dot_product_attention(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4))
            return mixed.unflatten(0, q.shape[:-3])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(dim=-1) @ v


class PerCamera(nn.Module):
    """A module of its own for the cells of each camera: what a command does differs from view to view.

    Source: Liang et al., "Mixture-of-Transformers" (2024), with cameras for modalities: attention alone is common.
    """

    def __init__(self, make: Callable[[], nn.Module], num_cameras: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(make() for _ in range(num_cameras))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., V * n, D), camera by camera, to (..., V * n, D')."""
        parts = x.chunk(len(self.each), dim=-2)
        return torch.cat([module(part) for module, part in zip(self.each, parts, strict=True)], dim=-2)


def per_camera(make: Callable[[], nn.Module], num_cameras: int) -> nn.Module:
    """A module for each camera; of one camera the module itself."""
    return make() if num_cameras == 1 else PerCamera(make, num_cameras)


class Block(nn.Module):
    """What blocks have in common: pre-norm attention, then an MLP, with weights of their own for each camera."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, num_cameras: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = per_camera(lambda: nn.LayerNorm(dim), num_cameras)
        self.qkv = per_camera(lambda: nn.Linear(dim, 3 * dim, bias=False), num_cameras)
        self.out = per_camera(lambda: nn.Linear(dim, dim, bias=False), num_cameras)
        self.norm2 = per_camera(lambda: nn.LayerNorm(dim), num_cameras)
        self.mlp = per_camera(lambda: MLP(dim, mlp_ratio), num_cameras)


class SpaceBlock(Block):
    """Self-attention over the cells of one frame, of all its cameras."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n, D) to the same shape; leading dimensions are independent."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "... n (three a d) -> three ... a n d", three=3, a=self.num_heads)
        x = x + self.out(rearrange(attend(q, k, v), "... a n d -> ... n (a d)"))
        return x + self.mlp(self.norm2(x))


class TimeBlock(Block):
    """Causal self-attention at each cell over the last `window` frames and the first one.

    The first frame, the anchor, stays in sight however long ago it was: it shows what stands behind the arm now.
    Positions enter by a learned bias per head and distance (the last entry: an anchor out of the window), so cached
    keys stay as they are while the window slides.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, window: int, num_cameras: int = 1) -> None:
        super().__init__(dim, num_heads, mlp_ratio, num_cameras)
        self.window = window
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, window + 1))

    def _qkv(self, x: Tensor) -> Tensor:
        """(B, T, n, D) -> (3, B, n, heads, T, d)."""
        return rearrange(self.qkv(self.norm1(x)), "b t n (three a d) -> three b n a t d", three=3, a=self.num_heads)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(rearrange(attended, "b n a t d -> b t n (a d)"))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """Run a whole clip.

        Args:
            x: (B, T, n, D), the anchor first.
            times: (B, T) int64, control step of each frame, increasing; after the anchor there may be a gap.

        Returns:
            (B, T, n, D).
        """
        q, k, v = self._qkv(x)
        distance = times[:, :, None] - times[:, None, :]  # (B, T, T), query less key
        allowed = (distance >= 0) & (distance < self.window)
        allowed[:, :, 0] = True
        bias = self.distance_bias[:, distance.clamp(0, self.window)].masked_fill(~allowed, float("-inf"))
        return self._finish(x, attend(q, k, v, bias.transpose(0, 1)[:, None]))

    def step(self, x: Tensor, cache: Sequence[Tensor], count: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run one new frame against the cached ones.

        The cache is a queue of tensors, so that the window slides without copying what it holds.

        Args:
            x: (B, 1, n, D).
            cache: keys and values (B, 2, n, heads, d) of `window` frames: the anchor, then the last window - 1 frames,
                the newest last.
            count: (B,) int64, how many frames came before this one.

        Returns:
            The output (B, 1, n, D) and the next cache.
        """
        q, k, v = self._qkv(x)  # (B, n, heads, 1, d)
        new = torch.stack([k, v], dim=1).squeeze(-2)
        anchor, *recent = cache
        anchor = torch.where((count == 0).view(-1, 1, 1, 1, 1), new, anchor)
        seen = [anchor, *recent, new]
        age = torch.arange(self.window, -1, -1, device=x.device)  # of each entry, in frames; the anchor counts as the
        valid = age[None, :] <= count[:, None]  # oldest, and only once it has left the window
        bias = self.distance_bias.flip(-1).masked_fill(~valid[:, None, :], float("-inf"))[:, None]  # (B, 1, heads, m)
        # One query a cell: entry by entry nothing is copied, and compiled all entries are read in one loop.
        q = q.squeeze(-2) * (1 / math.sqrt(q.shape[-1]))
        scores = torch.stack([(q * entry[:, 0]).sum(dim=-1) for entry in seen], dim=-1) + bias.to(q.dtype)
        weights = scores.softmax(dim=-1)
        attended = torch.zeros_like(q)
        for i, entry in enumerate(seen):
            attended = attended + weights[..., i, None] * entry[:, 1]
        return self._finish(x, attended[..., None, :]), [anchor, *seen[2:]]
