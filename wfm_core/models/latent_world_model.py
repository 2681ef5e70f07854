"""Latent diffusion behind the `WorldModel` protocol: a continuous tokenizer and a `LatentDynamics`."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from wfm_core.models.patch_world_model import Dynamics, PatchWorldModel
from wfm_core.models.text import TextEncoder
from wfm_core.tokenizers.patch import PatchTokenizer
from wfm_core.world_model import ModelState


class LatentDynamics(Dynamics, Protocol):
    """What predicts the latents of frames: `DiffusionModel`, and `Irasim`, with which it is compared."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one frame's latents."""
        ...

    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], *, text: Tensor | None = None
    ) -> ModelState:
        """Prefill the context: latents (B, T, h, w, C), actions (B, T - 1, 7) between the frames, B row seeds.

        A network that reads may be given `text` (B, W, D), features that are zero where there is no word.
        """
        ...

    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Predict the next frame: (B, 7) to state, latents (B, h, w, C) and uncertainty (B,) in [0, 1)."""
        ...

    def step_chunk(self, state: ModelState, actions: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Predict the next c frames: (B, c, 7) to state, latents (B, c, h, w, C), uncertainties (B, c) in [0, 1)."""
        ...


class LatentWorldModel(PatchWorldModel[LatentDynamics]):
    """Implements `wfm_core.world_model.WorldModel`; its latents are the tokenizer's.

    Raises:
        ValueError: tokenizer and dynamics disagree on the latents.
    """

    def __init__(
        self, tokenizer: PatchTokenizer, dynamics: LatentDynamics, text_encoder: TextEncoder | None = None
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
        """Prefill from latents (B, T, h, w, C), physical actions (B, T - 1, 7), B row seeds and B instructions.

        A `DiffusionModel` also begins without a frame (T = 0, no actions), from the instruction alone.
        """
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
