"""Token predictors behind the `WorldModel` protocol: a discrete tokenizer and a dynamics network of either kind."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wfm_core.models.text import TextEncoder
from wfm_core.tokenizers.patch import PatchTokenizer, to_float, to_uint8
from wfm_core.world_model import Layout, ModelState, Reference


class TokenDynamics(Protocol):
    """What a `TokenWorldModel` asks of a network that predicts tokens, which also is an `nn.Module`."""

    @property
    def layout(self) -> Layout:
        """Of the tokens that it reads and writes."""
        ...

    def to(self, dtype: torch.dtype, /) -> Any:
        """Cast the weights, in place."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the weights, all of one type."""
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


class TokenWorldModel(nn.Module):
    """Implements `wfm_core.world_model.WorldModel`; its latents are FSQ codes in [-1, 1].

    Raises:
        ValueError: tokenizer and dynamics disagree on the grid or the FSQ levels.
    """

    dynamics: TokenDynamics

    def __init__(
        self, tokenizer: PatchTokenizer, dynamics: TokenDynamics, text_encoder: TextEncoder | None = None
    ) -> None:
        """Put the parts together; `text_encoder` is for a dynamics network that reads instructions."""
        super().__init__()
        if tokenizer.layout != dynamics.layout:
            raise ValueError(
                f"tokenizer and dynamics must share cells and levels, got {tokenizer.layout} and {dynamics.layout}"
            )
        self.tokenizer = tokenizer
        self.dynamics = dynamics
        self.text_encoder = text_encoder
        self.latent_shape = tokenizer.latent_shape
        self.frame_shape = (tokenizer.config.image_size, tokenizer.config.image_size, 3)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast all weights but the encoder's, in place.

        Rounding to FSQ levels magnifies rounding errors: a bfloat16 encoder gives a quarter of the cells another token.
        """
        self.dynamics.to(dtype)
        for name, parameter in self.tokenizer.named_parameters():
            if not name.startswith("encoder."):
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode uint8 frames (B, T, H, W, 3) to latents (B, T, h, w, C) float32.

        Raises:
            ValueError: the frames have another size than the model was trained on.
        """
        if tuple(frames.shape[2:]) != self.frame_shape:
            raise ValueError(f"frames must have shape (B, T, {self.frame_shape}), got {tuple(frames.shape)}")
        latents = self.tokenizer.encode(to_float(frames.flatten(0, 1)))
        return latents.unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], instructions: Sequence[str] | None = None
    ) -> ModelState:
        """Prefill from latents (B, T, h, w, C), physical actions (B, T - 1, 7), B row seeds and B instructions."""
        tokens = self.tokenizer.fsq.to_indices(rearrange(latents, "b t h w c -> b t (h w) c"))
        if self.text_encoder is None or instructions is None:
            return self.dynamics.start(tokens, actions, seeds)
        features = self.text_encoder(instructions).to(tokens.device)
        # As many words in every state, so that rows of two batches can be merged.
        text = F.pad(features, (0, 0, 0, self.text_encoder.max_words - features.shape[1]))
        return self.dynamics.start(tokens, actions, seeds, text=text)

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
        return state, rearrange(codes, "b (h w) c -> b h w c", h=self.tokenizer.grid), uncertainty

    @torch.no_grad()
    def decode(self, latents: Tensor, reference: Reference) -> Tensor:
        """Decode latents (B, h, w, C) to uint8 frames (B, H, W, 3); the reference is a context frame of each row."""
        dtype = next(self.dynamics.parameters()).dtype
        frames = to_float(reference.frames).to(dtype)
        return to_uint8(self.tokenizer.decode(latents.to(dtype), frames, reference.latents.to(dtype)))
