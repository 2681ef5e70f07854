"""Weights that lie in memory as the CPU's matrix kernels want them: layer by layer, or in a compiled graph."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wfm_core.models.blocks import MLP


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference in bfloat16 on a CPU: the same products in a half to two thirds of the time.

    oneDNN re-orders a plain weight in every call. This one is re-ordered once, and no longer to be trained, saved or
    moved to another device. The products may be rectified where they arise, with `activation` "relu".
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.activation, [], "")


def pack_linears(module: nn.Module) -> None:
    """Replace the linear layers inside a module, in place, where that helps: bfloat16 weights on a CPU."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
            rectified = isinstance(module, MLP) and name == "up"
            setattr(module, name, PackedLinear(child, "relu" if rectified else "none"))
            if rectified:
                module.rectify = nn.Identity()
        else:
            pack_linears(child)


def frozen[**Given, Made](function: Callable[Given, Made], device: torch.device) -> Callable[Given, Made]:
    """Compile a function for inference on a device, its weights being constants from its first call on.

    The first call with arguments of other shapes takes a minute or so. On a CPU the kernels are called from C++, which
    saves a tenth of the time of 16 rows. On a GPU they are launched as one CUDA graph; as the next call writes to the
    same memory, what is returned is a copy.
    """
    on_cpu = device.type == "cpu"
    compiled = torch.compile(function, dynamic=False, mode=None if on_cpu else "reduce-overhead")

    def run(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        # All must hold where it is called: with gradients on, or told of freezing by an option of `compile` alone,
        # weights stay inputs of the graph and are laid out anew in every call.
        with torch.no_grad(), torch._inductor.config.patch(freezing=True, cpp_wrapper=on_cpu):
            made = compiled(*args, **kwargs)
            return made if on_cpu else copied(made)

    return run


def copied(made: Any) -> Any:
    """A nest of dictionaries, tuples and dataclasses with copies of its tensors; whatever else is in it stays."""
    if isinstance(made, Tensor):
        return made.clone()
    if isinstance(made, dict):
        return {name: copied(value) for name, value in made.items()}
    if isinstance(made, tuple):
        values = map(copied, made)
        return type(made)(*values) if hasattr(made, "_fields") else tuple(values)
    if is_dataclass(made) and not isinstance(made, type):
        return replace(made, **{field.name: copied(getattr(made, field.name)) for field in fields(made)})
    return made
