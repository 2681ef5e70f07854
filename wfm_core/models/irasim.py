"""The baseline: a diffusion transformer in the manner of IRASim, which imagines a whole clip at once.

Attention is over the cells of a frame and over the frames at a cell in turn, and looks both ways in time. Each frame's
action modulates its cells, the whole trajectory what is mixed over time. The first frame is given, the others are
denoised together; a rollout is one clip after the other, each from the last frame of the one before, with no other
memory. It is here to be compared with, trained and rolled out by the same commands as the others.

Source: Zhu et al., "IRASim: Learning Interactive Real-Robot Action Simulators" (2024), section 4, which builds on Ma et
al., "Latte: Latent Diffusion Transformer for Video Generation" (2024), variant 1; noise and what is predicted are those
of Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), sampling is that of Song et al., "Denoising
Diffusion Implicit Models" (ICLR 2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.data.actions import ACTION_DIM
from wfm_core.models.diffusion_blocks import DiTBlock, LevelEmbedding
from wfm_core.models.latent_network import LatentConfig, LatentNetwork, from_tokens, to_tokens
from wfm_core.models.positions import sinusoids
from wfm_core.models.transformer_blocks import ActionEmbedding, within_bounds
from wfm_core.samplers import euler
from wfm_core.sampling import row_normal
from wfm_core.world_model import ModelState

NOISE_STEPS = 1000
BETAS = (1e-4, 0.02)  # from the first noise step to the last


def noise_levels() -> Tensor:
    """Noise over data at each of the noise steps, (NOISE_STEPS,) float64, rising."""
    kept = torch.cumprod(1 - torch.linspace(*BETAS, NOISE_STEPS, dtype=torch.float64), dim=0)
    return ((1 - kept) / kept).sqrt()


@dataclass(frozen=True)
class IrasimConfig(LatentConfig):
    """Sizes of an `Irasim`, as many parameters as the default `DiffusionConfig` has (within 5%), and how it samples.

    `patch` cells square are one token. A clip is `num_frames` long, the first one given, and sampled in `num_steps`.
    """

    patch: int = 1
    width: int = 256
    num_layers: int = 6
    num_heads: int = 4
    ffn_ratio: int = 4
    num_frames: int = 16
    num_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
        if self.patch < 1 or any(size % self.patch for size in self.grid):
            raise ValueError(f"patch must divide the grid, got {self.patch} and {self.grid}")
        if self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, the given one and the next, got {self.num_frames}")
        if not 1 <= self.num_steps <= NOISE_STEPS:
            raise ValueError(f"num_steps must lie in [1, {NOISE_STEPS}], got {self.num_steps}")

    @property
    def chunk(self) -> int:
        """Frames that are imagined at once."""
        return self.num_frames - 1

    @property
    def text_encoder(self) -> str:
        """None: it reads nothing."""
        return ""


class Irasim(LatentNetwork[IrasimConfig]):
    """The network, its loss and its rollouts, which are a `wfm_core.world_model.WorldModel`'s.

    Latents are (..., h, w, C) as the tokenizer gives them; actions are physical (see `wfm_core.data.actions`).
    """

    positions: Tensor

    def __init__(self, config: IrasimConfig) -> None:
        super().__init__()
        self.config = config
        width, waves = config.width, config.width // 6 * 6
        token_dim = config.latent_dim * config.patch**2
        self.embed_patch = nn.Linear(token_dim, width)
        self.embed_position = nn.Linear(waves, width, bias=False)
        self.embed_noise = LevelEmbedding(width)
        self.embed_action = ActionEmbedding(width)
        self.embed_no_action = nn.Parameter(torch.zeros(width))
        self.embed_trajectory = nn.Sequential(
            nn.Linear(config.chunk * ACTION_DIM, width), nn.SiLU(), nn.Linear(width, width)
        )
        sizes = (width, config.num_heads, config.ffn_ratio)
        self.layers = nn.ModuleList(DiTBlock(*sizes) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate_last = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, token_dim)
        for last in (self.modulate_last, self.head):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        rows, columns = (torch.arange(float(size // config.patch)) for size in config.grid)
        places = torch.cartesian_prod(torch.arange(float(config.num_frames)), rows, columns)
        self.register_buffer("positions", sinusoids(places, waves), persistent=False)

    def _noise_in(self, first: Tensor, noisy: Tensor, step: Tensor, sigma: Tensor, actions: Tensor) -> Tensor:
        """What noise the network sees.

        Args:
            first: (B, h, w, C) normalised, the frame that is given.
            noisy: (B, T - 1, h, w, C) normalised data plus sigma times noise.
            step: (B,) noise step, from 1.
            sigma: (B,) float32, its level.
            actions: (B, T - 1, 7) between the frames.

        Returns:
            (B, T - 1, h, w, C) float32.
        """
        dtype = self.embed_no_action.dtype
        shrunk = noisy / (1 + sigma.square()).sqrt()[:, None, None, None, None]
        shown = torch.cat([first[:, None], shrunk], dim=1)
        x = self.embed_patch(to_tokens(shown, self.config.patch).to(dtype))
        x = x + self.embed_position(self.positions.to(dtype)).unflatten(0, (x.shape[1], -1))
        noise = self.embed_noise(step / NOISE_STEPS)[:, None]
        told = self.embed_action(actions)
        of_frames = noise + torch.cat([self.embed_no_action.to(told.dtype).expand(len(told), 1, -1), told], dim=1)
        trajectory = within_bounds(actions, self.embed_action.low, self.embed_action.extent).flatten(1)
        of_clip = noise + self.embed_trajectory(trajectory.to(dtype))[:, None]
        for k, layer in enumerate(self.layers):
            over_time = k % 2 == 1
            x = layer(x, of_clip if over_time else of_frames, over_time=over_time)
        shift, scale = self.modulate_last(F.silu(of_frames))[:, :, None].chunk(2, dim=-1)
        out = self.head(self.norm(x) * (1 + scale) + shift)[:, 1:].float()
        return from_tokens(out, self.config.patch, self.config.grid)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `latents` (B, T, h, w, C) float of consecutive frames, T the configuration's; `action` (B, T, 7),
                sent after each; `seed`, int64 scalar for what is random.

        Raises:
            ValueError: clips of another length.
        """
        latents = self.normalise(batch["latents"])
        if latents.shape[1] != self.config.num_frames:
            raise ValueError(f"clips must have {self.config.num_frames} frames, got {latents.shape[1]}")
        step, noise = self._draw(latents[:, 1:], batch["seed"])
        sigma = noise_levels().float().to(step.device)[step - 1]
        noisy = latents[:, 1:] + sigma[:, None, None, None, None] * noise
        error = (self._noise_in(latents[:, 0], noisy, step, sigma, batch["action"][:, :-1]) - noise).square().mean()
        return error, {"error": error.detach()}

    @torch.compiler.disable(recursive=False)  # a generator is new in every step
    def _draw(self, like: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """Noise steps (B,) and noise of the shape of `like` (B, ...)."""
        generator = torch.Generator(device=like.device).manual_seed(int(seed))
        step = torch.randint(1, NOISE_STEPS + 1, (len(like),), generator=generator, device=like.device)
        return step, torch.randn(like.shape, generator=generator, device=like.device)

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], *, text: Tensor | None = None
    ) -> ModelState:
        """Take the last of the context frames (B, T, h, w, C); actions (B, T - 1, 7) and text are of no use."""
        seed = torch.as_tensor(list(seeds), dtype=torch.int64, device=latents.device)
        return {"last": latents[:, -1].float().clone(), "seed": seed, "step": torch.zeros_like(seed)}

    @torch.no_grad()
    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Predict the next frame, as `step_chunk` does: (B, 7) to state, latents (B, h, w, C), uncertainty (B,)."""
        state, latents, uncertainty = self.step_chunk(state, action[:, None])
        return state, latents[:, 0], uncertainty[:, 0]

    @torch.no_grad()
    def step_chunk(self, state: ModelState, actions: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Predict the next c frames from physical actions (B, c, 7), c at most `chunk`.

        Fewer actions are continued by the last one, and what follows from that is thrown away.

        Returns:
            The state after the last frame, latents (B, c, h, w, C) float32 and uncertainties (B, c) in [0, 1), which
            are as `wfm_core.models.denoising.DiffusionModel.step_chunk` has them.

        Raises:
            ValueError: there are more actions than frames are imagined at once.
        """
        config, (batch, count) = self.config, actions.shape[:2]
        if not 1 <= count <= config.chunk:
            raise ValueError(f"actions must be of 1 to {config.chunk} frames, the model's chunk, got {count}")
        told = torch.cat([actions, actions[:, -1:].expand(-1, config.chunk - count, -1)], dim=1)
        size = config.grid[0] * config.grid[1] * config.latent_dim
        draws = [row_normal(state["seed"], state["step"] + k, 0, size) for k in range(config.chunk)]
        noise = torch.stack(draws, dim=1).unflatten(-1, self.latent_shape)
        first = self.normalise(state["last"])
        levels = noise_levels().tolist()
        steps = torch.linspace(NOISE_STEPS, 1, config.num_steps).round().long().tolist()
        step_of = {levels[k - 1]: k for k in steps}
        predictions: list[Tensor] = []

        def denoise(x: Tensor, sigma: float) -> Tensor:
            step, level = (torch.full((batch,), float(value), device=x.device) for value in (step_of[sigma], sigma))
            predictions.append(x - sigma * self._noise_in(first, x, step, level, told))
            return predictions[-1]

        sample = euler(denoise, noise, [*step_of, 0.0])[:, :count]
        spread = (sample - predictions[0][:, :count]).square().mean(dim=(2, 3, 4))
        latents = self.restore(sample)
        state = {**state, "last": latents[:, -1], "step": state["step"] + count}
        return state, latents, spread / (1 + spread)
