"""A world model's view of what is observed, for policies that read latents."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wfm_core.checkpoint import find_checkpoint, load_patch_tokenizer
from wfm_core.tokenizers.patch import PatchTokenizer, to_float
from worldsim.protocols import Obs


class LatentView:
    """Gives the latents of observations, encoding pixels where there are none yet; rows are independent."""

    def __init__(self, world_model: str | Path) -> None:
        """Take a world model's shipped name or folder.

        Raises:
            ValueError: there is none.
        """
        self.folder = find_checkpoint(world_model)

    @cached_property
    def tokenizer(self) -> PatchTokenizer:
        """What encodes; loaded when a pixel is seen."""
        return load_patch_tokenizer(self.folder)

    @torch.no_grad()
    def of(self, obs: Obs) -> Tensor:
        """Return latents (B, h, w, C) float32.

        Raises:
            ValueError: pixels of another size than the world model's.
        """
        if "latents" in obs:
            return torch.from_numpy(np.ascontiguousarray(obs["latents"]))
        pixels = torch.from_numpy(np.ascontiguousarray(obs["pixels"]))
        if tuple(pixels.shape[1:]) != self.tokenizer.frame_shape:
            raise ValueError(f"pixels must be (B, {self.tokenizer.frame_shape}), got {tuple(pixels.shape)}")
        return self.tokenizer.encode(to_float(pixels))
