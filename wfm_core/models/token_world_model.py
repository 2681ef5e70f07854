"""Token predictors behind the `WorldModel` protocol: a discrete tokenizer and a dynamics network of either kind."""

from collections.abc import Sequence
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from wfm_core.models.patch_world_model import Dynamics, PatchWorldModel
from wfm_core.models.text import TextEncoder
from wfm_core.tokenizers.patch import PatchTokenizer
from wfm_core.world_model import Layout, ModelState


class TokenDynamics(Dynamics, Protocol):
    """What a `TokenWorldModel` asks of a network that predicts tokens, which also is an `nn.Module`."""

    @property
    def layout(self) -> Layout:
        """Of the tokens that it reads and writes."""
        ...

    def start(self, tokens: Tensor, actions: Tensor, seeds: Sequence[int], *, text: Tensor | None = None) -> ModelState:
        """Prefill the context: tokens (B, T, n, C), actions (B, T - 1, 7) between the frames, B row seeds.

        A network that reads may be given `text` (B, W, D), features that are zero where there is no word.
        """
        ...

    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """Predict the next frame: physical action (B, 7) to the next state and the uncertainty (B,) in [0, 1].

        The new frame's tokens are `state["tokens"]` (B, n, C) uint8.
        """
        ...

    def step_token_by_token(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor]:
        """As `step`, in the slow way that others are compared with."""
        ...


class TokenWorldModel(PatchWorldModel[TokenDynamics]):
    """Implements `wfm_core.world_model.WorldModel`; its latents are FSQ codes in [-1, 1].

    Raises:
        ValueError: tokenizer and dynamics disagree on the grid or the FSQ levels.
    """

    def __init__(
        self, tokenizer: PatchTokenizer, dynamics: TokenDynamics, text_encoder: TextEncoder | None = None
    ) -> None:
        """Put the parts together; `text_encoder` is for a dynamics network that reads instructions."""
        num_cameras, rows, columns = dynamics.layout.cells
        if tokenizer.layout != dynamics.layout._replace(cells=(1, rows, columns)):
            raise ValueError(
                f"tokenizer and dynamics must share cells and levels, got {tokenizer.layout} and {dynamics.layout}"
            )
        super().__init__(tokenizer, dynamics, text_encoder, num_cameras)

    @torch.no_grad()
    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], instructions: Sequence[str] | None = None
    ) -> ModelState:
        """Prefill from latents (B, T, h, w, C), physical actions (B, T - 1, 7), B row seeds and B instructions."""
        tokens = self.tokenizer.fsq.to_indices(rearrange(latents, "b t h w c -> b t (h w) c"))
        return self.dynamics.start(tokens, actions, seeds, text=self.features_of(instructions, tokens.device))

    @torch.no_grad()
    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Advance by a physical action (B, 7); returns state, latents (B, h, w, C) and uncertainty (B,)."""
        return self._with_latents(*self.dynamics.step(state, action))

    @torch.no_grad()
    def step_token_by_token(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """As `step`, in the slow way that others are compared with (see `TokenDynamics.step_token_by_token`)."""
        return self._with_latents(*self.dynamics.step_token_by_token(state, action))

    def _with_latents(self, state: ModelState, uncertainty: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        codes = self.tokenizer.fsq.to_codes(state["tokens"])
        return state, rearrange(codes, "b (h w) c -> b h w c", w=self.tokenizer.grid), uncertainty
