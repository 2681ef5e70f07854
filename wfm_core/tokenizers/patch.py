"""Image-rate tokenizer: Haar front end, patch-local encoder, FSQ or none, convolutional decoder with a reference.

The encoder sees one patch at a time (kernel = stride), so a patch whose pixels did not change keeps its tokens; a world
model over such tokens need not re-predict what stands still. Context across patches is the decoder's business. It also
sees a real frame of the same episode, as a rollout always has one (its context): where the latents say that nothing has
changed it copies pixels, so that what stands still stays sharp and the latents' bits go to what moves.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wfm_core.tokenizers.fsq import FSQ
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.tokenizers.losses import foreground_mask, reconstruction_loss
from wfm_core.tokenizers.wavelet import haar2d, inverse_haar2d
from wfm_core.world_model import Layout

HAAR_LEVELS = 2
CONTINUOUS_STEP = 0.1
"""What counts as a step of a continuous latent: half of it is no change, the whole is what training adds."""


@dataclass(frozen=True)
class PatchTokenizerConfig:
    """Sizes of a `PatchTokenizer`; `patch` pixels square become one cell of `len(levels)` FSQ dimensions.

    Without `levels` the latents are continuous, `latent_dim` numbers a cell. In training the foreground weighs
    `foreground_gain` more, and the decoder sees a fraction `corruption` of the cells off by a level (or
    `CONTINUOUS_STEP`) here and there, as imagined ones are.
    """

    image_size: int = 128
    patch: int = 16
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5) * 3
    latent_dim: int = 16
    encoder_dim: int = 384
    encoder_blocks: int = 3
    decoder_dims: tuple[int, ...] = (256, 128, 64)
    decoder_blocks: tuple[int, ...] = (2, 3, 2)
    foreground_gain: float = 4.0
    corruption: float = 0.05

    def __post_init__(self) -> None:
        upsampling = 2 ** (len(self.decoder_dims) - 1 + HAAR_LEVELS)
        if upsampling != self.patch or len(self.decoder_blocks) != len(self.decoder_dims):
            raise ValueError(
                f"decoder_dims must have log2(patch) - {HAAR_LEVELS} + 1 entries, as many as decoder_blocks; got patch "
                f"{self.patch}, {len(self.decoder_dims)} dims, {len(self.decoder_blocks)} blocks"
            )
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch, got {self.image_size} and {self.patch}")

    @property
    def name(self) -> str:
        """C or D for continuous or discrete, I for image, the spatial factors, and what tells it from the others."""
        return f"{'D' if self.levels else 'C'}I{self.patch}x{self.patch} patch"


class PatchTokenizer(nn.Module):
    """Frames to latents in [-1, 1] and back, one frame at a time."""

    step: Tensor

    def __init__(self, config: PatchTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.image_size // config.patch
        self.frame_shape = (config.image_size, config.image_size, 3)
        self.quantise = FSQ(config.levels) if config.levels else nn.Tanh()
        self.latent_dim = len(config.levels) or config.latent_dim
        patch_dim = 3 * config.patch**2
        self.encoder = nn.Sequential(
            nn.Linear(patch_dim, config.encoder_dim),
            *[PatchBlock(config.encoder_dim) for _ in range(config.encoder_blocks)],
            nn.RMSNorm(config.encoder_dim),
            nn.Linear(config.encoder_dim, self.latent_dim),
        )
        dims = config.decoder_dims
        self.position = nn.Parameter(0.02 * torch.randn(1, dims[0], self.grid, self.grid))
        self.from_latents = nn.Conv2d(2 * self.latent_dim + 1, dims[0], 1)
        haar_dim = 3 * 4**HAAR_LEVELS
        self.from_reference = nn.ModuleList(
            nn.Conv2d(haar_dim * 4 ** (len(dims) - 1 - i), dim, 1) for i, dim in enumerate(dims)
        )
        self.upsample = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, 4 * dim, 1), nn.PixelShuffle(2)) for before, dim in pairwise(dims)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*[ConvBlock(dim) for _ in range(blocks)])
            for dim, blocks in zip(dims, config.decoder_blocks, strict=True)
        )
        self.to_haar = nn.Conv2d(dims[-1], haar_dim + 4**HAAR_LEVELS, 3, padding=1)
        levels = torch.tensor(config.levels or [1 + 2 / CONTINUOUS_STEP] * self.latent_dim)
        self.register_buffer("step", 2 / (levels - 1), persistent=False)

    @property
    def layout(self) -> Layout:
        """Of a frame's tokens."""
        return Layout((1, self.grid, self.grid), tuple(self.config.levels))

    @property
    def fsq(self) -> FSQ:
        """What turns latents into tokens and back.

        Raises:
            ValueError: the latents are continuous.
        """
        if not isinstance(self.quantise, FSQ):
            raise ValueError("tokens need a discrete tokenizer, got a continuous one (without levels)")
        return self.quantise

    @property
    def codec(self) -> LatentCodec:
        """How its latents are kept."""
        return LatentCodec((self.grid, self.grid), self.config.levels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one frame's latents."""
        return self.grid, self.grid, self.latent_dim

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames: (N, 3, H, W) float in [-1, 1].

        Returns:
            (N, h, w, C) float32 in [-1, 1], FSQ codes if discrete.
        """
        block = self.config.patch // 2**HAAR_LEVELS
        patches = rearrange(haar2d(frames, HAAR_LEVELS), "n c (h p) (w q) -> n h w (c p q)", p=block, q=block)
        return self.quantise(self.encoder(patches.to(next(self.encoder.parameters()).dtype)).float())

    def decode(self, latents: Tensor, reference_frames: Tensor, reference_latents: Tensor) -> Tensor:
        """Decode latents to frames.

        Args:
            latents: (N, h, w, C).
            reference_frames: (N, 3, H, W) float in [-1, 1], real frames of the same episodes.
            reference_latents: (N, h, w, C), the encoder's of the reference frames.

        Returns:
            (N, 3, H, W) float, about [-1, 1] (not clipped).
        """
        unchanged = ((latents - reference_latents).abs() < self.step.min() / 2).all(dim=-1, keepdim=True)
        cells = torch.cat([latents, reference_latents, unchanged.to(latents.dtype)], dim=-1)
        x = self.from_latents(rearrange(cells, "n h w c -> n c h w"))
        x = (x + self.position.to(x.dtype)).contiguous(memory_format=torch.channels_last)
        reference_frames = reference_frames.to(x.dtype)
        haar = haar2d(reference_frames, HAAR_LEVELS)
        for i, (look, stage) in enumerate(zip(self.from_reference, self.stages, strict=True)):
            if i > 0:
                x = self.upsample[i - 1](x)
            x = stage(x + look(F.pixel_unshuffle(haar, 2 ** (len(self.stages) - 1 - i))))
        x = self.to_haar(x)
        drawn, gate = (inverse_haar2d(part, HAAR_LEVELS) for part in x.split([haar.shape[1], 4**HAAR_LEVELS], dim=1))
        return torch.lerp(reference_frames, drawn, gate.sigmoid())

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: uint8 `frames`, `reference` (a frame of the same episode each) and `background`, (N, H, W, 3); and
                `seed`, int64 scalar.
        """
        frames, reference = to_float(batch["frames"]), to_float(batch["reference"])
        foreground = foreground_mask(batch["frames"], batch["background"])
        latents, reference_latents = self.encode(torch.cat([frames, reference])).chunk(2)
        decoded = self.decode(self._corrupt(latents, batch["seed"]), reference, reference_latents)
        error = decoded.float() - frames
        loss = reconstruction_loss(error, 1 + self.config.foreground_gain * foreground)
        with torch.no_grad():
            squared = error.square().mean(dim=1, keepdim=True) / 4
            psnr = -10 * squared.mean(dim=(1, 2, 3)).log10().mean()
            foreground_psnr = -10 * ((squared * foreground).sum() / foreground.sum().clamp(min=1)).log10()
        return loss, {"psnr": psnr, "foreground_psnr": foreground_psnr}

    @torch.compiler.disable  # a new generator in compiled code would have it compiled anew in every step
    def _corrupt(self, latents: Tensor, seed: Tensor) -> Tensor:
        """Move a third of the dimensions of some cells (N, h, w, C) by one level; gradients pass."""
        generator = torch.Generator(device=latents.device).manual_seed(int(seed))
        cells = torch.rand(latents.shape[:-1], generator=generator, device=latents.device) < self.config.corruption
        dims = torch.rand(latents.shape, generator=generator, device=latents.device) < 1 / 3
        up = torch.rand(latents.shape, generator=generator, device=latents.device) < 0.5
        moved = torch.where(up, self.step, -self.step) * (cells[..., None] & dims)
        return (latents + moved).clamp(-1, 1)


class PatchBlock(nn.Module):
    """Residual MLP on one patch's features (..., D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ConvBlock(nn.Module):
    """Residual pair of 3x3 convolutions with a per-position norm over channels (N, D, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, D, H, W) to the same shape."""
        y = x * ((x.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt() * self.scale.to(x.dtype))
        return x + self.conv2(F.silu(self.conv1(y)))


def to_float(frames: Tensor) -> Tensor:
    """uint8 frames (N, H, W, 3) to channels-first float32 (N, 3, H, W) in [-1, 1]."""
    return rearrange(frames, "n h w c -> n c h w").contiguous().float() / 127.5 - 1


def to_uint8(frames: Tensor) -> Tensor:
    """Float frames (N, 3, H, W) in about [-1, 1] to uint8 (N, H, W, 3)."""
    return rearrange(((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), "n c h w -> n h w c")
