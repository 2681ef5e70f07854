"""What a training run will take, told without running it: parameters, memory and arithmetic."""

import torch
from torch import nn

from wfm_core.models import diffusion_config, transformer_config
from wfm_core.models.diffusion import Diffusion
from wfm_core.models.text import load_text_encoder
from wfm_core.models.transformer import Transformer
from wfm_core.train import TrainConfig, state_bytes

GIB = 2**30


def training_figures(
    model: nn.Module, loop: TrainConfig, *, batch_size: int, clip_length: int, fused: bool
) -> dict[str, float]:
    """Count what training takes.

    Args:
        model: on the meta device, which holds no numbers, or any other.
        loop: settings of the loop.
        batch_size: clips of a batch.
        clip_length: frames of a clip.
        fused: attention keeps no scores, as on a GPU.

    Returns:
        "parameters"; bytes of "weights", "gradients", "optimizer" and "average"; for a `Transformer` or a `Diffusion`
        also "activations", bytes that one batch's forward pass keeps, and "flops" of a step, backward passes included.
    """
    figures: dict[str, float] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    figures |= state_bytes(model, loop)
    if isinstance(model, Transformer | Diffusion):
        encoder = model.config.text_encoder
        on_gpu = loop.bf16 is None and fused  # which need not be here to be asked
        width = 2 if on_gpu else loop.dtype(torch.device("cpu")).itemsize
        sizes = {
            "num_frames": clip_length,
            "batch_size": batch_size,
            "text_words": load_text_encoder(encoder).max_words if encoder else 0,
            "activation_width": width,
            "fused": fused,
        }
        if isinstance(model, Transformer):
            cost = transformer_config.training_cost(model.config, **sizes)
        else:
            cost = diffusion_config.training_cost(model.config, **sizes)
        # A backward pass takes twice as much as a forward pass.
        flops = 3 * cost.frame_flops * (clip_length - 1) * batch_size * loop.accumulate
        figures |= {"activations": cost.activation_bytes, "flops": flops}
    return figures


def describe(figures: dict[str, float]) -> str:
    """Say `training_figures` in words."""
    held = {name: size for name, size in figures.items() if name not in ("parameters", "flops")}
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items())
    lines = [
        f"{figures['parameters']:,.0f} parameters",
        f"memory in GiB: {parts}; {sum(held.values()) / GIB:.2f} in all (several processes share all but activations)",
    ]
    if "flops" in figures:
        lines.append(f"{figures['flops']:.3g} floating-point operations a step, forward and backward")
    else:
        lines.append("activations and operations are estimated for dynamics.kind=transformer and diffusion only")
    return "\n".join(lines)
