"""The diffusion decoder: a discrete tokenizer's tokens to the latents of a continuous one, whose decoder draws pixels.

Tokens say what is in a cell, not all of how it looks: a decoder trained on the mean of what may lie behind them blurs.
Here one of the latents that may lie behind them is drawn instead, under the tokens of its frame and of a reference.

Source: the idea is from NVIDIA, "Cosmos World Foundation Model Platform for Physical AI" (2025), section 5.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wfm_core.models.diffusion_blocks import DiTBlock, LevelEmbedding
from wfm_core.models.latent_network import LatentConfig, LatentNetwork
from wfm_core.samplers import euler, flow, shifted_levels
from wfm_core.sampling import row_normal
from wfm_core.tokenizers.patch import PatchTokenizer


@dataclass(frozen=True)
class DiffusionDecoderConfig(LatentConfig):
    """Sizes of a `LatentDenoiser` and how it samples.

    It turns `code_dim` numbers in each cell, which stand for its tokens, to the latents that the tokenizer of the
    checkpoint `latents_of` has there, in `num_steps` steps.
    """

    code_dim: int = 18
    latents_of: str = "bridge-nano-diffusion"
    width: int = 192
    num_layers: int = 5
    num_heads: int = 3
    ffn_ratio: int = 4
    num_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")


class LatentDenoiser(LatentNetwork[DiffusionDecoderConfig]):
    """The network, and the loss that trains it; every frame is on its own."""

    def __init__(self, config: DiffusionDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, cells = config.width, config.grid[0] * config.grid[1]
        self.embed_cells = nn.Linear(2 * (config.latent_dim + config.code_dim), width)
        self.position = nn.Parameter(0.02 * torch.randn(cells, width))
        self.embed_noise = LevelEmbedding(width)
        sizes = (width, config.num_heads, config.ffn_ratio)
        self.layers = nn.ModuleList(DiTBlock(*sizes) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.latent_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _velocity(self, noised: Tensor, level: Tensor, given: Tensor) -> Tensor:
        """Noise less data (B, h, w, C) float32, behind normalised latents at levels (B,), under `conditions`."""
        dtype = self.position.dtype
        x = self.embed_cells(torch.cat([noised, given], dim=-1).to(dtype)).flatten(1, 2) + self.position
        noise = self.embed_noise(level)[:, None]
        x = x[:, None].to(dtype)
        for layer in self.layers:
            x = layer(x, noise)
        return self.head(self.norm(x[:, 0])).unflatten(1, self.config.grid).float()

    def conditions(self, codes: Tensor, reference_codes: Tensor, reference: Tensor) -> Tensor:
        """What is known (B, h, w, 2 * code_dim + C): codes of the frame and of a reference, the latter's latents."""
        return torch.cat([codes, reference_codes, self.normalise(reference)], dim=-1)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `latents` and `codes` (B, h, w, .) of frames, `reference_latents` and `reference_codes` of another
                frame of the same episodes, and `seed`, int64 scalar.
        """
        target = self.normalise(batch["latents"])
        noise, level = self._draw(target, batch["seed"])
        wide = level[:, None, None, None]
        given = self.conditions(batch["codes"], batch["reference_codes"], batch["reference_latents"])
        velocity = self._velocity(target * (1 - wide) + noise * wide, level, given)
        error = (velocity - (noise - target)).square().mean(dim=(1, 2, 3))
        return error.mean(), {"denoised": (error * level.square()).mean().detach()}

    @torch.compiler.disable(recursive=False)  # a generator is new in every step
    def _draw(self, like: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """Noise of the shape of `like` (B, ...) and levels (B,)."""
        generator = torch.Generator(device=like.device).manual_seed(int(seed))
        noise = torch.randn(like.shape, generator=generator, device=like.device)
        return noise, torch.rand(len(like), generator=generator, device=like.device)

    @torch.no_grad()
    def sample(self, given: Tensor, num_steps: int | None = None) -> Tensor:
        """Draw latents (B, h, w, C) float32 under `conditions`.

        Every frame has the same noise, so that what does not change from frame to frame does not flicker.
        """
        size = self.position.shape[0] * self.config.latent_dim
        zero = torch.zeros(1, dtype=torch.int64, device=given.device)
        noise = row_normal(zero, zero, 0, size).view(1, *self.latent_shape).expand(len(given), -1, -1, -1)

        def denoise(x: Tensor, level: float) -> Tensor:
            levels = torch.full((len(x),), level, device=x.device)
            made = flow(levels[:, None, None, None])
            return made.skip * x + made.out * self._velocity(x, levels, given)

        return self.restore(euler(denoise, noise, shifted_levels(num_steps or self.config.num_steps)))


class DiffusionDecoder(nn.Module):
    """Decodes a discrete tokenizer's codes, with the same arguments as `PatchTokenizer.decode`."""

    def __init__(self, denoiser: LatentDenoiser, tokenizer: PatchTokenizer) -> None:
        """Put the network together with the continuous tokenizer whose latents it draws.

        Raises:
            ValueError: the tokenizer's latents have another shape.
        """
        super().__init__()
        if tokenizer.latent_shape != denoiser.latent_shape:
            raise ValueError(
                f"{denoiser.config.latents_of} must have latents {denoiser.latent_shape}, got {tokenizer.latent_shape}"
            )
        self.denoiser = denoiser
        self.tokenizer = tokenizer

    def decode(self, latents: Tensor, reference_frames: Tensor, reference_latents: Tensor) -> Tensor:
        """Decode codes (N, h, w, code_dim) to frames (N, 3, H, W) float, about [-1, 1].

        Args:
            latents: the discrete tokenizer's codes.
            reference_frames: (N, 3, H, W) float in [-1, 1], real frames of the same episodes.
            reference_latents: (N, h, w, code_dim), their codes.
        """
        reference = self.tokenizer.encode(reference_frames)
        drawn = self.denoiser.sample(self.denoiser.conditions(latents, reference_latents, reference))
        dtype = self.tokenizer.position.dtype
        return self.tokenizer.decode(drawn.to(dtype), reference_frames, reference.to(dtype))
