"""Low-rank adaptation: train a few directions of each large matrix, then add them to it.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wfm_core.posttrain import belongs_to

SMALLEST = 64
"""Sides from which on a matrix is large: below, all of it costs no more than what would stand for it."""


class LowRank(nn.Module):
    """Adds a matrix of low rank, zero at first, to a weight (rows, columns)."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Map (rows, columns) to the same shape."""
        return weight + self.up @ self.down


def add_lora(model: nn.Module, rank: int, whole: Sequence[str] = ()) -> list[str]:
    """Freeze a model in place but for adapters of its large matrices, and for some parts.

    Args:
        model: as it was pretrained.
        rank: of each adapter.
        whole: parts that are trained as they are, new ones for instance.

    Returns:
        Names of the matrices that have an adapter now.

    Raises:
        ValueError: the rank is not positive, or no matrix is large.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(belongs_to(name, whole))
    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and min(module.weight.shape) >= SMALLEST and not belongs_to(name, whole)
    ]
    if not adapted:
        raise ValueError(f"LoRA needs a linear layer of {SMALLEST} or more on both sides, got none; train all weights")
    for name in adapted:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape, rank))
    return adapted


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to their matrices, in place; the model is as any other then."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
