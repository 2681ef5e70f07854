"""Finite scalar quantisation: a latent vector rounded to a small grid, dimension by dimension, no codebook.

Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (ICLR 2024).
"""

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Quantise each of C dimensions to its own number of levels, equally spaced in [-1, 1].

    Args:
        levels: the number of levels of each dimension, each at least 2.
    """

    steps: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if min(levels) < 2:
            raise ValueError(f"every dimension needs at least 2 levels, got {levels}")
        self.levels = levels
        self.register_buffer("steps", torch.tensor(levels, dtype=torch.float32) - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Quantise (..., C) unbounded values to float32 codes in [-1, 1]; gradients pass straight through."""
        scaled = (
            torch.sigmoid(1.6 * x.float()) * self.steps.float()
        )  # 1.6 makes a unit normal spread evenly over the levels
        rounded = scaled + (scaled.round() - scaled).detach()
        return rounded * (2 / self.steps.float()) - 1

    def to_indices(self, codes: Tensor) -> Tensor:
        """Codes (..., C) in [-1, 1] to int64 level indices (..., C), 0 <= index < levels."""
        return ((codes.float() + 1) * (self.steps.float() / 2)).round().long()

    def to_codes(self, indices: Tensor) -> Tensor:
        """Level indices (..., C) to float32 codes (..., C) in [-1, 1]."""
        return indices.float() * (2 / self.steps.float()) - 1
