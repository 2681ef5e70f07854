"""Latent diffusion behind the `WorldModel` protocol: a continuous tokenizer and a `DiffusionModel`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wfm_core.models.denoising import DiffusionModel
from wfm_core.models.patch_world_model import PatchWorldModel
from wfm_core.models.text import TextEncoder
from wfm_core.tokenizers.patch import PatchTokenizer
from wfm_core.world_model import ModelState


class LatentWorldModel(PatchWorldModel[DiffusionModel]):
    """Implements `wfm_core.world_model.WorldModel`; its latents are the tokenizer's.

    Raises:
        ValueError: tokenizer and dynamics disagree on the latents.
    """

    def __init__(
        self, tokenizer: PatchTokenizer, dynamics: DiffusionModel, text_encoder: TextEncoder | None = None
    ) -> None:
        """Put the parts together; `text_encoder` is for a dynamics network that reads instructions."""
        if tokenizer.latent_shape != dynamics.latent_shape:
            raise ValueError(
                "tokenizer and dynamics must share grid and latent_dim, got latents (h, w, C) "
                f"{tokenizer.latent_shape} and {dynamics.latent_shape}"
            )
        super().__init__(tokenizer, dynamics, text_encoder)

    @torch.no_grad()
    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], instructions: Sequence[str] | None = None
    ) -> ModelState:
        """Prefill from latents (B, T, h, w, C), physical actions (B, T - 1, 7), B row seeds and B instructions."""
        return self.dynamics.start(latents, actions, seeds, text=self.features_of(instructions, latents.device))

    @torch.no_grad()
    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Advance by a physical action (B, 7); returns state, latents (B, h, w, C) and uncertainty (B,) in [0, 1)."""
        return self.dynamics.step(state, action)

    @torch.no_grad()
    def step_chunk(self, state: ModelState, actions: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Advance by c physical actions (B, c, 7) at once, c at most the model's `chunk`.

        Returns:
            The state after the last, latents (B, c, h, w, C) and uncertainties (B, c) in [0, 1).
        """
        return self.dynamics.step_chunk(state, actions)
