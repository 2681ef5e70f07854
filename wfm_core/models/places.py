"""Where things are, read from a world model's features of each cell: what teaches it to see distances.

Tokens of the next frame can be predicted to the letter by copying most of them, without an idea of where the hand is
beside a thing. Whether it grasps depends on millimetres. So where the data say where the gripper and the objects are, a
model may also be trained to say it; nothing of that is read when it generates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT = 0.1
"""m over the table that are told as 1."""
BETA = 0.02
"""Of the smooth L1 loss, in cells and in units of `HEIGHT`: 2 mm of it."""
KINDS = 2
"""The gripper, and everything else."""
OUT_DIM = KINDS * 4


def loss_of_places(told: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """How far from the truth it is what a model says of places.

    Args:
        told: (B, T, h, w, OUT_DIM) for each cell and kind the logit of one being there, how far right and below of the
            cell's middle it is seen, in cells, and how high it is, in units of `HEIGHT`.
        places: (B, T, K, 3) the gripper's first: fractions of the image's width and height at which each is seen, and
            its height (m); NaN where it is not known.

    Returns:
        The loss, and the mean distance in the image, in cells, without gradient; both 0 where nothing is known.
    """
    sides = places.new_tensor([told.shape[3], told.shape[2]])
    known = places.isfinite().all(dim=-1)  # (B, T, K)
    at = places[..., :2].nan_to_num() * sides
    seen = known & (at >= 0).all(dim=-1) & (at < sides).all(dim=-1)
    column, row = torch.where(seen[..., None], at, 0).long().unbind(dim=-1)
    kind = torch.ones_like(row)
    kind[..., 0] = 0
    slot = (row * told.shape[3] + column) * KINDS + kind  # (B, T, K) into cells and kinds
    flat = told.float().unflatten(-1, (KINDS, 4)).flatten(2, 4)  # (B, T, h * w * KINDS, 4)
    there = torch.zeros_like(flat[..., 0]).scatter_add(-1, slot, seen.to(flat.dtype)).clamp(max=1)
    count = seen.sum().clamp(min=1)
    presence = F.binary_cross_entropy_with_logits(flat[..., 0], there, reduction="none").sum(dim=-1)
    presence = (presence * seen.any(dim=-1)).sum() / count
    offset = at - torch.stack([column, row], dim=-1) - 0.5
    target = torch.cat([offset, places[..., 2:].nan_to_num() / HEIGHT], dim=-1)
    found = flat[..., 1:].gather(2, slot[..., None].expand(*slot.shape, 3))
    off = F.smooth_l1_loss(found, target.to(found.dtype), beta=BETA, reduction="none").sum(dim=-1)
    with torch.no_grad():
        distance = ((found - target)[..., :2].norm(dim=-1) * seen).sum() / count
    return presence + (off * seen).sum() / count, distance


class PlaceHead(nn.Sequential):
    """Features (..., p, D) of patches to what `loss_of_places` takes, of all cells of each patch side by side."""

    def __init__(self, width: int, patch_cells: int) -> None:
        says = nn.Linear(width, patch_cells * OUT_DIM)
        nn.init.zeros_(says.weight)
        nn.init.zeros_(says.bias)
        says.bias.data.view(-1, KINDS, 4)[..., 0] = -4.0  # most cells hold nothing
        super().__init__(nn.LayerNorm(width), says)
