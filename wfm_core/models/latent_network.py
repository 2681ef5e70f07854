"""What networks over a tokenizer's latents share: the shape of a frame's, and bringing them to unit scale and back."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentConfig:
    """What the configuration of such a network says of latents.

    A cell of the `grid` has `latent_dim` numbers, which are brought to the mean 0 and the standard deviation
    `sigma_data` by `latent_mean` and `latent_std`, one a dimension (none: the latents have 0 and 1 already).
    """

    latent_dim: int = 16
    grid: tuple[int, int] = (8, 8)
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.latent_dim):
                raise ValueError(
                    f"{name} must have latent_dim = {self.latent_dim} entries or none, got {getattr(self, name)}"
                )

    @property
    def sigma_data(self) -> float:
        """Standard deviation of normalised latents."""
        return 1.0


def to_tokens(latents: Tensor, patch: int) -> Tensor:
    """Latents (B, T, h, w, C) to tokens (B, T, n, patch * patch * C), `patch` cells square each."""
    return rearrange(latents, "b t (h p) (w q) c -> b t (h w) (p q c)", p=patch, q=patch)


def from_tokens(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Invert `to_tokens`; `grid` is (h, w)."""
    sizes = {"h": grid[0] // patch, "p": patch, "q": patch}
    return rearrange(tokens, "b t (h w) (p q c) -> b t (h p) (w q) c", **sizes)


class LatentNetwork[ConfigT: LatentConfig](nn.Module):
    """A network whose `config` says how latents are distributed."""

    config: ConfigT

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one frame's latents."""
        return (*self.config.grid, self.config.latent_dim)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents (..., C) to float32 of mean 0 and standard deviation `sigma_data`."""
        mean, std = self._statistics(latents.device)
        return (latents.float() - mean) / std

    def restore(self, normalised: Tensor) -> Tensor:
        """Invert `normalise`."""
        mean, std = self._statistics(normalised.device)
        return normalised * std + mean

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Not buffers: these would be rounded with the weights.
        config = self.config
        mean = torch.tensor(config.latent_mean or (0.0,), device=device)
        return mean, torch.tensor(config.latent_std or (1.0,), device=device) / config.sigma_data
