"""What networks over a tokenizer's latents share: the shape of a frame's, and bringing them to unit scale and back."""

from typing import Protocol

import torch
from torch import Tensor, nn


class LatentConfig(Protocol):
    """What is asked of such a network's configuration."""

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of a frame, rows and columns."""
        ...

    @property
    def latent_dim(self) -> int:
        """Numbers of a cell."""
        ...

    @property
    def latent_mean(self) -> tuple[float, ...]:
        """Of each of them; empty for 0."""
        ...

    @property
    def latent_std(self) -> tuple[float, ...]:
        """Of each of them; empty for 1."""
        ...

    @property
    def sigma_data(self) -> float:
        """Standard deviation of normalised latents."""
        ...


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
