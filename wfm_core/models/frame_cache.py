"""Keys and values of the frames in sight, of the first frame and of the last window - 1, as a value that rolls on.

They lie in a `ModelState` as a queue of tensors, so that the window slides without copying what it holds.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wfm_core.models.positions import NATIVE_FPS, RopeConfig, rotate, rotations
from wfm_core.world_model import ModelState


class CacheSizes(Protocol):
    """What a cache asks of a network's configuration."""

    @property
    def num_layers(self) -> int:
        """Blocks that attend."""
        ...

    @property
    def head_dim(self) -> int:
        """Of their keys and values, d."""
        ...

    @property
    def window(self) -> int:
        """Frames kept, the first among them."""
        ...

    @property
    def rope(self) -> RopeConfig:
        """By which their keys are turned."""
        ...


class InSight(NamedTuple):
    """What frames to come may see.

    Attributes:
        times: (B, 1) when the next frame is, in frames at the native rate.
        seen: (B, M) bool, which of the cached keys are in sight.
        layers: of each block, tensors (B, 2, N', L, d) that make M keys and values together, the first frame's first.
    """

    times: Tensor
    seen: Tensor
    layers: list[list[Tensor]]


def empty_cache(
    config: CacheSizes, num_heads: int, length: int, seeds: Sequence[int], fps: float, like: Tensor
) -> ModelState:
    """A state before the first frame.

    Args:
        config: of the network.
        num_heads: of keys and values, N'.
        length: keys of a frame, L.
        seeds: B ints.
        fps: frames a second.
        like: gives type and device of the keys.

    Raises:
        ValueError: fps is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    batch, device = len(seeds), like.device
    shape = (batch, 2, num_heads, length, config.head_dim)
    cache = {
        f"cache{i}.{k}": torch.zeros(shape, device=device, dtype=like.dtype)
        for i in range(config.num_layers)
        for k in range(config.window)
    }
    return cache | {
        "count": torch.zeros(batch, dtype=torch.int64, device=device),
        "fps": torch.full((batch,), fps, device=device),
        "seed": torch.as_tensor(list(seeds), dtype=torch.int64, device=device),
        "step": torch.zeros(batch, dtype=torch.int64, device=device),
    }


def in_sight(state: ModelState, config: CacheSizes, ahead: int = 1) -> InSight:
    """Lay out what the next `ahead` frames may see."""
    count, window = state["count"], config.window
    step = NATIVE_FPS / state["fps"]
    # The first frame is never farther than any was in training.
    latest = (count + ahead - 1) * step
    forward = F.pad((latest - (config.rope.longest - 1)).clamp(min=0)[:, None], (0, 2))
    cosines, sines = (x[:, None, None] for x in rotations(forward, config.head_dim, config.rope))
    layers = []
    for i in range(config.num_layers):
        sink, *recent = (state[f"cache{i}.{k}"] for k in range(window))
        layers.append([torch.stack([rotate(sink[:, 0], cosines, sines), sink[:, 1]], dim=1), *recent])
    age = torch.arange(window, 0, -1, device=count.device)  # the first frame counts as the oldest, and only
    seen = (age <= count[:, None]).repeat_interleave(layers[0][0].shape[3], dim=1)  # once it has left the window
    return InSight((count * step)[:, None], seen, layers)


def in_sight_after(state: ModelState, config: CacheSizes) -> tuple[Tensor, Tensor]:
    """What the frame after the next may see: which of the cached keys, (B, M) bool, and the next frame or not, (B,)."""
    count, window = state["count"][:, None], config.window
    age = torch.arange(window - 1, 0, -1, device=count.device)  # of the cached frames but the first, for the next one
    recent = (age <= count) & (age < window - 1)
    first = (count > 0) & (count + 1 >= window)
    seen = torch.cat([first, recent], dim=1).repeat_interleave(state["cache0.0"].shape[3], dim=1)
    return seen, (state["count"] == 0) | (window > 1)


def append(state: ModelState, config: CacheSizes, new: Sequence[Tensor]) -> ModelState:
    """Append a frame's keys and values (B, 2, N', L, d), one tensor for each block."""
    first = (state["count"] == 0).view(-1, 1, 1, 1, 1)
    state = {**state, "count": state["count"] + 1}
    for i, own in enumerate(new):
        sink, *recent = (state[f"cache{i}.{k}"] for k in range(config.window))
        queue = [torch.where(first, own, sink), *[*recent, own][1:]]
        state |= {f"cache{i}.{k}": entry for k, entry in enumerate(queue)}
    return state
