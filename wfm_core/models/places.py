"""Where things are, read from a world model's features of each cell: what teaches it to see distances.

Tokens of the next frame can be predicted to the letter by copying most of them, without an idea of where the hand is
beside a thing. Whether it grasps depends on millimetres. So where the data say where the gripper and the objects are, a
model may also be trained to say it; nothing of that is read when it generates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CENTRE, SCALE = (0.3, 0.0, 0.1), 0.1
"""Position (m) that is told as 0, and how many metres are told as 1."""
BETA = 0.02
"""Of the smooth L1 loss of a position, in units of `SCALE`: 2 mm."""
KINDS = 2
"""The gripper, and everything else."""
OUT_DIM = KINDS * 4


def loss_of_places(told: Tensor, positions: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """How far from the truth it is what a model says of places.

    Args:
        told: (B, T, n, OUT_DIM) for each cell and kind the logit of one being there, and its position.
        positions: (B, T, K, 3) metres, the gripper's first; NaN where it is not known.
        cells: (B, T, K) int64 in which each is seen; negative: in none.

    Returns:
        The loss, and the mean error in metres, without gradient; both 0 where nothing is known.
    """
    told = told.float().unflatten(-1, (KINDS, 4))
    seen = (cells >= 0) & positions.isfinite().all(dim=-1)  # (B, T, K)
    kind = torch.ones_like(cells).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=cells.device), 0)
    slot = torch.where(seen, cells, 0) * KINDS + kind  # (B, T, K) into cells and kinds
    flat = told.flatten(2, 3)  # (B, T, n * KINDS, 4)
    there = torch.zeros_like(flat[..., 0]).scatter_add(-1, slot, seen.to(flat.dtype)).clamp(max=1)
    known = seen.any(dim=-1, keepdim=True).expand_as(there)
    presence = F.binary_cross_entropy_with_logits(flat[..., 0], there, reduction="none")
    count = seen.sum().clamp(min=1)
    presence = (presence * known).sum() / count
    at = flat[..., 1:].gather(2, slot[..., None].expand(*slot.shape, 3))
    target = (positions.nan_to_num() - positions.new_tensor(CENTRE)) / SCALE
    off = (F.smooth_l1_loss(at, target, beta=BETA, reduction="none").sum(dim=-1) * seen).sum() / count
    with torch.no_grad():
        error = ((at - target).norm(dim=-1) * seen).sum() / count * SCALE
    return presence + off, error


class PlaceHead(nn.Linear):
    """Features (..., p, D) of patches to what `loss_of_places` takes, of all cells of each patch side by side."""

    def __init__(self, width: int, patch_cells: int) -> None:
        super().__init__(width, patch_cells * OUT_DIM)
        nn.init.constant_(self.bias.data.view(-1, KINDS, 4)[..., 0], -4.0)  # most cells hold nothing
