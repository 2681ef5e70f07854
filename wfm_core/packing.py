"""Linear layers whose weights lie in memory as the CPU's matrix kernels want them."""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference in bfloat16 on a CPU: the same products in a half to two thirds of the time.

    oneDNN re-orders a plain weight in every call. This one is re-ordered once, and no longer to be trained, saved or
    moved to another device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linears(module: nn.Module) -> None:
    """Replace the linear layers inside a module, in place, where that helps: bfloat16 weights on a CPU."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
