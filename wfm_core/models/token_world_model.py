"""The autoregressive family behind the `WorldModel` protocol: a discrete tokenizer and an `AutoregressiveModel`."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from wfm_core.models.autoregressive import AutoregressiveModel
from wfm_core.tokenizers.discrete import DiscreteTokenizer, to_float, to_uint8
from wfm_core.world_model import ModelState, Reference


class TokenWorldModel(nn.Module):
    """Implements `wfm_core.world_model.WorldModel`; its latents are FSQ codes in [-1, 1].

    Raises:
        ValueError: tokenizer and dynamics disagree on the grid or the FSQ levels.
    """

    def __init__(self, tokenizer: DiscreteTokenizer, dynamics: AutoregressiveModel) -> None:
        super().__init__()
        made = (tokenizer.grid, tuple(tokenizer.config.levels))
        read = (dynamics.config.grid, tuple(dynamics.config.levels))
        if made != read:
            raise ValueError(f"tokenizer and dynamics must share (grid, levels), got {made} and {read}")
        self.tokenizer = tokenizer
        self.dynamics = dynamics
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

    @property
    def _dtype(self) -> torch.dtype:
        return self.dynamics.position.dtype

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
    def start(self, latents: Tensor, actions: Tensor, seeds: Sequence[int]) -> ModelState:
        """Prefill from latents (B, T, h, w, C), physical actions (B, T - 1, 7) and B row seeds."""
        tokens = self.tokenizer.fsq.to_indices(rearrange(latents, "b t h w c -> b t (h w) c"))
        return self.dynamics.start(tokens, actions, seeds)

    @torch.no_grad()
    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Advance by a physical action (B, 7); returns state, latents (B, h, w, C) and uncertainty (B,)."""
        return self._with_latents(*self.dynamics.step(state, action))

    @torch.no_grad()
    def step_token_by_token(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """As `step`, a cell's worth of tokens at a time (see `AutoregressiveModel.step_token_by_token`)."""
        return self._with_latents(*self.dynamics.step_token_by_token(state, action))

    def _with_latents(self, state: ModelState, uncertainty: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        codes = self.tokenizer.fsq.to_codes(state["tokens"])
        return state, rearrange(codes, "b (h w) c -> b h w c", h=self.tokenizer.grid), uncertainty

    @torch.no_grad()
    def decode(self, latents: Tensor, reference: Reference) -> Tensor:
        """Decode latents (B, h, w, C) to uint8 frames (B, H, W, 3); the reference is a context frame of each row."""
        frames = to_float(reference.frames).to(self._dtype)
        return to_uint8(self.tokenizer.decode(latents.to(self._dtype), frames, reference.latents.to(self._dtype)))
