"""Behaviour cloning from pixels: a small convolutional network that finds keypoints by a spatial softmax."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from policies.actor import ActorConfig, ActorNetwork, chunked, load_actor
from policies.chunking import ChunkedPolicy
from worldsim.protocols import Obs


@dataclass
class BCConfig(ActorConfig):
    """Sizes of the network.

    Attributes:
        image_size: height and width of `pixels`.
        width: channels of the first convolution; later ones have twice as many.

    Raises:
        ValueError: an image size that is not a multiple of 4.
    """

    image_size: int = 128
    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {self.image_size}")


class BCNetwork(ActorNetwork[BCConfig]):
    """Pixels (B, H, W, 3) uint8, proprioception and instruction id to an action chunk and a waypoint."""

    kind = "bc"
    sees = "pixels"
    grid: Tensor

    def __init__(self, config: BCConfig) -> None:
        super().__init__(config, seen_dim=3 * config.num_keypoints)
        width, keypoints = config.width, config.num_keypoints
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(2 * width, 2 * width, 3, padding=dilation, dilation=dilation) for dilation in (1, 2, 4)
        )
        self.queries = nn.Linear(config.instruction_dim, keypoints * 2 * width)
        self.log_sharpness = nn.Parameter(torch.zeros(keypoints, 1))
        self.register_buffer("grid", torch.linspace(-1, 1, config.image_size // 4), persistent=False)

    def see(self, looked: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, 3 K) float32: x and y in [-1, 1] of each keypoint and the peak height of its softmax map."""
        x = rearrange(looked, "b h w c -> b c h w").to(torch.float32) / 127.5 - 1  # channels last, as stored
        x = functional.relu(self.stem(x))
        x = functional.relu(self.norm(self.down(x)))  # (B, 2 width, H/4, W/4)
        for conv in self.convs:
            x = x + functional.relu(conv(x))
        queries = rearrange(self.queries(embedding), "b (k c) -> b k c", c=x.shape[1])
        heat = torch.bmm(queries, rearrange(x, "b c h w -> b c (h w)")).float()  # (B, K, H/4 W/4)
        heat = (heat * self.log_sharpness.exp()).softmax(dim=-1)
        heat = rearrange(heat, "b k (h w) -> b k h w", w=x.shape[-1])
        across, down = heat.sum(dim=2) @ self.grid, heat.sum(dim=3) @ self.grid
        return torch.cat([across, down, heat.amax(dim=(-2, -1))], dim=-1)

    def picture(self, obs: Obs) -> Tensor:
        """Return the pixels (B, H, W, 3) uint8."""
        size = self.config.image_size
        pixels = torch.from_numpy(np.ascontiguousarray(obs["pixels"]))
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"pixels must be (B, {size}, {size}, 3), got {tuple(pixels.shape)}")
        return pixels


def load_network(folder: Path) -> BCNetwork:
    """Load the network of a folder written by `BCNetwork.save`; errors as for `load_actor`."""
    return load_actor(BCNetwork, BCConfig, folder)


def load_bc(folder: Path) -> ChunkedPolicy:
    """Load a folder written by `BCNetwork.save` as a policy; errors as for `load_actor`."""
    return chunked(load_network(folder))
