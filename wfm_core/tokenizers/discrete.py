"""Image-rate discrete tokenizer: Haar front end, patch-local encoder, FSQ, convolutional decoder.

The encoder sees one patch at a time (kernel = stride), so a patch whose pixels did not change keeps its tokens; a world
model over such tokens need not re-predict what stands still. Context across patches is the decoder's business.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wfm_core.tokenizers.fsq import FSQ
from wfm_core.tokenizers.losses import foreground_mask, reconstruction_loss
from wfm_core.tokenizers.wavelet import haar2d, inverse_haar2d

HAAR_LEVELS = 2


@dataclass(frozen=True)
class DiscreteTokenizerConfig:
    """Sizes of a `DiscreteTokenizer`; `patch` pixels square become one cell of `len(levels)` FSQ dimensions."""

    image_size: int = 128
    patch: int = 16
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5) * 3
    encoder_dim: int = 384
    encoder_blocks: int = 3
    decoder_dims: tuple[int, ...] = (256, 128, 64)
    decoder_blocks: tuple[int, ...] = (2, 2, 1)
    foreground_gain: float = 4.0

    def __post_init__(self) -> None:
        upsampling = 2 ** (len(self.decoder_dims) - 1 + HAAR_LEVELS)
        if upsampling != self.patch or len(self.decoder_blocks) != len(self.decoder_dims):
            raise ValueError(
                f"decoder_dims must have log2(patch) - {HAAR_LEVELS} + 1 entries, as many as decoder_blocks; got patch "
                f"{self.patch}, {len(self.decoder_dims)} dims, {len(self.decoder_blocks)} blocks"
            )
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch, got {self.image_size} and {self.patch}")


class DiscreteTokenizer(nn.Module):
    """Frames to FSQ latents and back, one frame at a time."""

    def __init__(self, config: DiscreteTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.image_size // config.patch
        self.fsq = FSQ(config.levels)
        patch_dim = 3 * config.patch**2
        self.encoder = nn.Sequential(
            nn.Linear(patch_dim, config.encoder_dim),
            *[PatchBlock(config.encoder_dim) for _ in range(config.encoder_blocks)],
            nn.RMSNorm(config.encoder_dim),
            nn.Linear(config.encoder_dim, len(config.levels)),
        )
        dims = config.decoder_dims
        self.position = nn.Parameter(0.02 * torch.randn(1, dims[0], self.grid, self.grid))
        self.from_latents = nn.Conv2d(len(config.levels), dims[0], 1)
        stages: list[nn.Module] = []
        for i, (dim, blocks) in enumerate(zip(dims, config.decoder_blocks, strict=True)):
            if i > 0:
                stages += [nn.Conv2d(dims[i - 1], 4 * dim, 1), nn.PixelShuffle(2)]
            stages += [ConvBlock(dim) for _ in range(blocks)]
        self.decoder = nn.Sequential(*stages, nn.Conv2d(dims[-1], 3 * 4**HAAR_LEVELS, 3, padding=1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one frame's latents."""
        return self.grid, self.grid, len(self.config.levels)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames: (N, 3, H, W) float in [-1, 1].

        Returns:
            (N, h, w, C) float32 FSQ codes in [-1, 1].
        """
        block = self.config.patch // 2**HAAR_LEVELS
        patches = rearrange(haar2d(frames, HAAR_LEVELS), "n c (h p) (w q) -> n h w (c p q)", p=block, q=block)
        return self.fsq(self.encoder(patches))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, h, w, C) to frames (N, 3, H, W), float, about [-1, 1] (not clipped)."""
        x = self.from_latents(rearrange(latents, "n h w c -> n c h w")) + self.position
        x = self.decoder(x.contiguous(memory_format=torch.channels_last))
        return inverse_haar2d(x, HAAR_LEVELS)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Training loss on uint8 `frames` (N, H, W, 3) with their `background` (N, H, W, 3)."""
        frames = to_float(batch["frames"])
        foreground = foreground_mask(batch["frames"], batch["background"])
        error = self.decode(self.encode(frames)).float() - frames
        loss = reconstruction_loss(error, 1 + self.config.foreground_gain * foreground)
        with torch.no_grad():
            squared = error.square().mean(dim=1, keepdim=True) / 4
            psnr = -10 * squared.mean(dim=(1, 2, 3)).log10().mean()
            foreground_psnr = -10 * ((squared * foreground).sum() / foreground.sum().clamp(min=1)).log10()
        return loss, {"psnr": psnr.item(), "foreground_psnr": foreground_psnr.item()}


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
