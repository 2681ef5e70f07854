"""How latents are kept on disk and in arrays: as FSQ level indices, or as they are in half precision."""

import numpy as np
import torch
from torch import Tensor

from wfm_core.tokenizers.fsq import FSQ


class LatentCodec:
    """Latents (..., h, w, C) to what is kept of them and back.

    Kept are level indices (..., n, C) uint8, the n cells in raster order, or float16 (..., h, w, C) if there are no
    levels.
    """

    def __init__(self, grid: tuple[int, int], levels: tuple[int, ...]) -> None:
        """Take the rows and columns of a frame, and the FSQ levels of each dimension; none: latents are continuous."""
        self.grid = grid
        self.fsq = FSQ(levels) if levels else None

    def pack(self, latents: Tensor) -> np.ndarray:
        """Latents (..., h, w, C) on any device to what is kept."""
        if self.fsq is None:
            return latents.half().cpu().numpy()
        return self.fsq.to_indices(latents.cpu()).flatten(-3, -2).to(torch.uint8).numpy()

    def unpack(self, kept: np.ndarray) -> Tensor:
        """What is kept to latents (..., h, w, C) float32."""
        values = torch.from_numpy(kept)
        return values.float() if self.fsq is None else self.fsq.to_codes(values).unflatten(-2, self.grid)
