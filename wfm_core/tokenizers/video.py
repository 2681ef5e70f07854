"""The tokenizer family: continuous or discrete, image or video, causal in time, any length in constant memory.

One network with a Haar front end. A video has 1 + n * `time_factor` frames and becomes 1 + n latent frames; an image is
a video of one frame.

Source: NVIDIA, "Cosmos World Foundation Model Platform for Physical AI" (2025), section 4.1.
"""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from wfm_core.tokenizers.causal import (
    Chain,
    ChannelNorm,
    Downsample,
    Past,
    ResidualBlock,
    SpaceAttention,
    SpaceConv,
    TimeAttention,
    Upsample,
    over_frames,
)
from wfm_core.tokenizers.fsq import FSQ
from wfm_core.tokenizers.wavelet import haar2d, haar3d, inverse_haar2d, inverse_haar3d

HAAR_LEVELS = 2
HAAR = 2**HAAR_LEVELS
SPACE_FACTORS = (8, 16)
TIME_FACTORS = (1, 4, 8)


@dataclass(frozen=True)
class VideoTokenizerConfig:
    """Sizes of a `VideoTokenizer`.

    `space_factor` pixels square and `time_factor` frames become one latent. `levels` are those of FSQ; empty for a
    continuous tokenizer with `latent_dim` channels. `dims` are the widths from the Haar resolution down; temporal
    attention sees `window` latent frames.
    """

    space_factor: int = 16
    time_factor: int = 1
    levels: tuple[int, ...] = ()
    latent_dim: int = 16
    dims: tuple[int, ...] = (128, 256, 256)
    num_blocks: int = 2
    num_heads: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        if self.space_factor not in SPACE_FACTORS or self.time_factor not in TIME_FACTORS:
            raise ValueError(
                f"space_factor must be in {SPACE_FACTORS} and time_factor in {TIME_FACTORS}, got {self.space_factor} "
                f"and {self.time_factor}"
            )
        if len(self.dims) != self.num_halvings + 1:
            raise ValueError(
                f"dims must have {self.num_halvings + 1} entries for space_factor={self.space_factor}, got {self.dims}"
            )
        if self.dims[-1] % self.num_heads:
            raise ValueError(f"the last of dims must be a multiple of num_heads, got {self.dims} and {self.num_heads}")

    @property
    def num_halvings(self) -> int:
        """How often space is halved after the Haar transform."""
        return (self.space_factor // HAAR).bit_length() - 1

    @property
    def halves_time(self) -> list[bool]:
        """Whether time is halved along with space, at each halving."""
        return [self.time_factor > HAAR * 2**i for i in range(self.num_halvings)]

    @property
    def is_video(self) -> bool:
        """Whether time is compressed; an image tokenizer has no layer that sees two frames."""
        return self.time_factor > 1

    @property
    def name(self) -> str:
        """As in the literature: C or D for continuous or discrete, I or V for image or video, then the factors."""
        kind = ("D" if self.levels else "C") + ("V" if self.is_video else "I")
        factors = (self.time_factor,) * self.is_video + (self.space_factor,) * 2
        return kind + "x".join(map(str, factors))

    def check_clip(self, time: int, height: int, width: int, *, first: bool = True) -> None:
        """Check that a video, or its next chunk if not `first`, fits the factors.

        Raises:
            ValueError: the number of frames or a side (pixels) does not.
        """
        if time < 1 or (time - first) % self.time_factor:
            expected = f"1 + a multiple of {self.time_factor}" if first else f"a multiple of {self.time_factor}"
            raise ValueError(f"{self.name} needs {expected} frames{' at the beginning' * first}, got {time}")
        if height % self.space_factor or width % self.space_factor:
            raise ValueError(
                f"{self.name} needs sides that are multiples of {self.space_factor}, got {(height, width)}"
            )


class VideoTokenizer(nn.Module):
    """Videos (B, T, 3, H, W) in [-1, 1] to latents (B, t, h, w, C) and back."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.fsq = FSQ(config.levels) if config.levels else None
        latent_dim = len(config.levels) or config.latent_dim
        haar_dim = 3 * HAAR ** (3 if config.is_video else 2)
        self.encoder = make_encoder(config, haar_dim, latent_dim)
        self.decoder = make_decoder(config, latent_dim, haar_dim)

    def encode(self, video: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Encode a video or its next chunk.

        Args:
            video: (B, T, 3, H, W) float in [-1, 1]; T is 1 + n * time_factor at the beginning, n * time_factor later.
            past: what the call before returned; None at the beginning.

        Returns:
            (B, t, h, w, C) latents, FSQ codes in [-1, 1] if discrete, and the past for the next chunk.

        Raises:
            ValueError: T, H or W does not fit the factors.
        """
        first, past = past is None, dict(past or {})
        self.config.check_clip(video.shape[1], video.shape[3], video.shape[4], first=first)
        if self.config.is_video:
            x = haar3d(video, HAAR_LEVELS, first=first)
        else:
            x = over_frames(lambda images: haar2d(images, HAAR_LEVELS), video)
        x = x.to(next(self.encoder.parameters()).dtype)
        latents = rearrange(self.encoder(x, past), "b t c h w -> b t h w c")
        return (self.fsq(latents) if self.fsq else latents), past

    def decode(self, latents: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Decode latents (B, t, h, w, C), or the next chunk of them, to (B, T, 3, H, W) float32 in about [-1, 1]."""
        first, past = past is None, dict(past or {})
        latents = latents.to(next(self.decoder.parameters()).dtype)
        x = self.decoder(rearrange(latents, "b t h w c -> b t c h w"), past).float()
        if self.config.is_video:
            return inverse_haar3d(x, HAAR_LEVELS, first=first), past
        return over_frames(lambda images: inverse_haar2d(images, HAAR_LEVELS), x), past


def make_encoder(config: VideoTokenizerConfig, in_dim: int, out_dim: int) -> Chain:
    """Build what maps Haar coefficients (B, T, C, H, W) to latents (B, t, C', h, w)."""
    dims, video = config.dims, config.is_video
    layers: list[nn.Module] = [SpaceConv(in_dim, dims[0])]
    for i, dim in enumerate(dims):
        if i > 0:
            layers.append(Downsample(dims[i - 1], dim, time=config.halves_time[i - 1]))
        layers += [ResidualBlock(dim, video=video) for _ in range(config.num_blocks)]
    return Chain([*layers, *_middle(config), ChannelNorm(dims[-1]), SpaceConv(dims[-1], out_dim, kernel=1)])


def make_decoder(config: VideoTokenizerConfig, in_dim: int, out_dim: int) -> Chain:
    """Build what maps latents (B, t, C, h, w) to Haar coefficients (B, T, C', H, W), a block a stage deeper."""
    dims, video = config.dims, config.is_video
    layers: list[nn.Module] = [SpaceConv(in_dim, dims[-1], kernel=1), *_middle(config)]
    for i, dim in reversed(list(enumerate(dims))):
        layers += [ResidualBlock(dim, video=video) for _ in range(config.num_blocks + 1)]
        if i > 0:
            layers.append(Upsample(dim, dims[i - 1], time=config.halves_time[i - 1]))
    return Chain([*layers, ChannelNorm(dims[0]), SpaceConv(dims[0], out_dim)])


def _middle(config: VideoTokenizerConfig) -> list[nn.Module]:
    """What looks across the whole of the coarsest frame, and back in time."""
    dim = config.dims[-1]
    layers: list[nn.Module] = [SpaceAttention(dim, config.num_heads)]
    if config.is_video:
        layers.append(TimeAttention(dim, config.num_heads, config.window))
    return [*layers, ResidualBlock(dim, video=config.is_video)]
