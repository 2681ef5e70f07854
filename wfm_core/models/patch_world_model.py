"""What world models over the latents of a `PatchTokenizer` have in common: frames to latents and back, and texts."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wfm_core.models.text import TextEncoder
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.tokenizers.patch import PatchTokenizer, to_float, to_uint8
from wfm_core.world_model import Reference


class Dynamics(Protocol):
    """What predicts, whatever it predicts; it also is an `nn.Module`."""

    def to(self, dtype: torch.dtype, /) -> Any:
        """Cast the weights, in place."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the weights, all of one type."""
        ...


class Decoder(Protocol):
    """What turns latents to pixels; it also is an `nn.Module`."""

    def decode(self, latents: Tensor, reference_frames: Tensor, reference_latents: Tensor) -> Tensor:
        """Decode latents (N, h, w, C) to frames (N, 3, H, W) float; see `PatchTokenizer.decode`."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the weights and their names."""
        ...


class PatchWorldModel[DynamicsT: Dynamics](nn.Module):
    """A tokenizer, a dynamics network and, if that reads instructions, a text encoder.

    Pixels are drawn by `decoder`, the tokenizer itself unless another one is put there. Frames of several cameras stand
    on top of each other, and so do their latents.
    """

    dynamics: DynamicsT
    decoder: Decoder

    def __init__(
        self,
        tokenizer: PatchTokenizer,
        dynamics: DynamicsT,
        text_encoder: TextEncoder | None = None,
        num_cameras: int = 1,
    ) -> None:
        super().__init__()
        self.num_cameras = num_cameras
        self.tokenizer = self.decoder = tokenizer
        self.dynamics = dynamics
        self.text_encoder = text_encoder
        (rows, columns, channels), (height, width, colours) = tokenizer.latent_shape, tokenizer.frame_shape
        self.latent_shape = (num_cameras * rows, columns, channels)
        self.frame_shape = (num_cameras * height, width, colours)
        self.codec = LatentCodec(self.latent_shape[:2], tokenizer.config.levels)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast all weights but the encoder's, in place.

        Rounding to FSQ levels magnifies rounding errors: a bfloat16 encoder gives a quarter of the cells another token.
        """
        self.dynamics.to(dtype)
        for name, parameter in [*self.tokenizer.named_parameters(), *self.decoder.named_parameters()]:
            if "encoder" not in name.split("."):
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
    def decode(self, latents: Tensor, reference: Reference) -> Tensor:
        """Decode latents (B, h, w, C) to uint8 frames (B, H, W, 3); the reference is a context frame of each row."""
        dtype = next(self.dynamics.parameters()).dtype
        frames = rearrange(to_float(reference.frames), "b c (v h) w -> (b v) c h w", v=self.num_cameras)
        mine, shown = (
            rearrange(each.to(dtype), "b (v h) w c -> (b v) h w c", v=self.num_cameras)
            for each in (latents, reference.latents)
        )
        decoded = to_uint8(self.decoder.decode(mine, frames, shown))
        return rearrange(decoded, "(b v) h w c -> b (v h) w c", v=self.num_cameras)

    def features_of(self, instructions: Sequence[str] | None, device: torch.device) -> Tensor | None:
        """Features (B, W, D) of instructions; None where there are none, or nobody to read them."""
        if self.text_encoder is None or instructions is None:
            return None
        features = self.text_encoder(instructions).to(device)
        # As many words in every state, so that rows of two batches can be merged.
        return F.pad(features, (0, 0, 0, self.text_encoder.max_words - features.shape[1]))
