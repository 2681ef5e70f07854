"""Diffusion models and clips of latents to check them with."""

import torch

from wfm_core.models.diffusion import Diffusion
from wfm_core.models.diffusion_config import DiffusionConfig

SIZES = {
    "latent_dim": 3, "grid": (2, 4), "width": 24, "head_dim": 8, "num_layers": 2, "num_heads": 2, "ffn_ratio": 2,
    "adaln_rank": 4, "window": 3, "num_steps": 3,
}  # fmt: skip


def make_diffusion[Network: Diffusion](kind: type[Network], **changes) -> Network:
    """A model with large random weights, so that every input matters, in float64; what it gives is float32."""
    torch.manual_seed(0)
    model = kind(DiffusionConfig(**SIZES | changes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.double().requires_grad_(False)


def clip(model: Diffusion, batch: int, time: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, T, h, w, C) and physical actions (B, T, 7) that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, time, *model.latent_shape, generator=generator)
    return latents, 0.05 * torch.rand(batch, time, 7, generator=generator)
