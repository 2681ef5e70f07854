"""Latent video diffusion: network and training loss.

A frame is `n` tokens, patches of its latents. In training there are two streams. The first is the past: frames as they
are, but for a little noise. The second is copies of all frames but the first, each with a noise level of its own, in
chunks; a copy sees the past before its chunk, in the last `window` frames and in the first, which stays in sight as an
attention sink, and the copies of its chunk up to itself. So one pass trains many frames, each under just what it will
see when it is generated. Each frame is told of its noise level, of the action that led to it, and of how far the
arm was told to go since the first frame; its tokens are shown what the last frame before its chunk has in their place,
since most of a scene stays as it is. How frames are generated is `denoising.py`'s business.

Source: the network, the weighting of the loss and the noise on the past follow NVIDIA, "Cosmos World Foundation Model
Platform for Physical AI" (2025), section 5.1; levels for each frame are from Chen et al., "Diffusion Forcing" (NeurIPS
2024); the last frame among the inputs is from Alonso et al., "Diffusion for World Modeling" (NeurIPS 2024).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfm_core.models.diffusion_blocks import Conditions, DiffusionBlock, Heard, LevelEmbedding, level_waves
from wfm_core.models.diffusion_config import FINEST_STEPS, WAVES_DIM, DiffusionConfig
from wfm_core.models.latent_network import LatentNetwork, from_tokens, to_tokens
from wfm_core.models.positions import NATIVE_FPS, bounded_sinusoids, rotations
from wfm_core.models.transformer_blocks import (
    Piece,
    RMSNorm,
    Sight,
    Text,
    read_text,
    runs,
    within_bounds,
)
from wfm_core.models.transformer_config import frames_in_sight
from wfm_core.samplers import Noising, edm, flow, two_half_steps

NOISIEST = 0.05
"""Fraction of frames whose noise lies between two standard deviations above the mean and the highest level.

Source: the idea is from NVIDIA, "World Simulation with Video Foundation Models for Physical AI" (2025), section 3.
"""


class Shown(NamedTuple):
    """T frames as the network takes them.

    Attributes:
        latents: (B, T, h, w, C) float32, normalised and noised.
        before: of the same shape, the last frame of the past before each one or its chunk; zero where there is none.
        level: (B, T) of the noise.
        past: how many of them, the first ones, are of the past.
        action: (B, T, A) physical, that led to each; NaN where it is not known.
        travel: (B, T, P) sum of the pose deltas commanded between the first frame and each.
        known: (B, T) bool, whether these two are told.
        step: (B, T), size of the step that is to be taken along a flow; 0: a very small one.
    """

    latents: Tensor
    before: Tensor
    level: Tensor
    past: int
    action: Tensor
    travel: Tensor
    known: Tensor
    step: Tensor


class Draws(NamedTuple):
    """What is random in a training step, for T' frames that are denoised.

    Attributes:
        chunk: how many frames are denoised together.
        noise: (2, B, T', h, w, C) on the frames, and on those of the past.
        level: (2, B, T') likewise.
        told: (B,) bool, which clips do not hide text and actions.
        step: (B, T') of frames that learn to go as far in one step as in two; 0 for the others.
    """

    chunk: int
    noise: Tensor
    level: Tensor
    told: Tensor
    step: Tensor


class Diffusion(LatentNetwork[DiffusionConfig]):
    """The network, and the loss that trains it.

    Latents are (..., h, w, C) as the tokenizer gives them, normalised ones of mean 0 and standard deviation
    `sigma_data`; actions are physical (see `wfm_core.data.actions`).
    """

    places: Tensor
    low: Tensor
    extent: Tensor
    travel_scale: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed_patch = nn.Linear(config.input_dim, width)
        self.embed_noise = LevelEmbedding(width)
        if config.shortcut:
            self.embed_step = LevelEmbedding(width)
            for weight in self.embed_step[-1].parameters():
                nn.init.zeros_(weight)  # so a model that learns shortcuts begins as it was
        if config.action_injection != "concat":
            dim = config.context_dim if config.action_injection == "cross_attention" else width
            self.embed_action = nn.Sequential(nn.Linear(config.command_dim, dim), nn.GELU(), nn.Linear(dim, dim))
            self.embed_no_action = nn.Embedding(1, dim)
            nn.init.normal_(self.embed_no_action.weight, std=0.02)
        self.embed_position = nn.Linear(width // 6 * 6, width, bias=False)
        self.modulate = nn.Linear(width, 3 * width)
        blocks = nn.ModuleList(DiffusionBlock(config) for _ in range(config.num_layers))
        self.blocks: Sequence[DiffusionBlock] = blocks  # ty: ignore[invalid-assignment]  # torch's stubs forget
        self.norm = RMSNorm(width)
        self.modulate_last = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.token_dim)
        self.head_log_error = nn.Linear(WAVES_DIM, 1, bias=False)
        for layer in (self.modulate, self.modulate_last, self.head, self.head_log_error):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        rows, columns = (torch.arange(size // config.patch) for size in config.grid)
        low, high = torch.tensor(config.actions.low), torch.tensor(config.actions.high)
        places, scale = torch.cartesian_prod(rows, columns).float(), torch.tensor(config.actions.travel_scale)
        for name, value in {"places": places, "low": low, "extent": high - low, "travel_scale": scale}.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.norm.weight.dtype

    # --- noise -------------------------------------------------------------------------------------------------------

    def noising(self, level: Tensor) -> Noising:
        """How frames look at levels (B, T), each entry (B, T, 1, 1, 1) but what the network is told, (B, T)."""
        made = edm(level, self.config.sigma_data) if self.config.formulation == "edm" else flow(level)
        return Noising(*(value[..., None, None, None] for value in made[:-1]), told=made.told)

    def level_of(self, sigma: Tensor) -> Tensor:
        """The level at which the noise is `sigma` times as large as latents of standard deviation 1."""
        return sigma if self.config.formulation == "edm" else sigma / (1 + sigma)

    # --- network -----------------------------------------------------------------------------------------------------

    def sight(self, times: Tensor, pieces: Sequence[Piece]) -> Sight:
        """Describe a pass over frames at times (B or 1, T), in frames at the native rate since the first."""
        config = self.config
        places = self.places.expand(*times.shape, -1, -1)
        positions = torch.cat([times[..., None, None].float().expand(*places.shape[:-1], 1), places], dim=-1).flatten(
            1, 2
        )
        cosines, sines = rotations(positions, config.head_dim, config.rope)
        waves = bounded_sinusoids(positions, config.width // 6 * 6, config.rope).to(self.dtype)
        return Sight(self.embed_position(waves), cosines[:, None], sines[:, None], pieces)

    def read(self, text: Tensor) -> Text:
        """Prepare text features (B, W, text_dim), all zero where there is no word, for the blocks.

        Raises:
            ValueError: the model reads no text.
        """
        if not self.config.text_dim:
            raise ValueError("text needs a model with text_dim above 0, got 0")
        return read_text(self.blocks, text, self.dtype)

    def silence(self, batch: int) -> Text:
        """What there is to read where there is no text, for the blocks of a model that attends to something."""
        return read_text(self.blocks, self.places.new_zeros(batch, 0, self.config.context_dim), self.dtype)

    def run(
        self,
        shown: Shown,
        sight: Sight,
        text: Text | None,
        told: Tensor | None,
        look: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the network over T frames.

        Args:
            shown: the frames.
            sight: see there.
            text: see there; None: there is none.
            told: (B,) bool, which rows' frames that are not of the past may read it; None: all.
            look: takes the number of a block and the tokens' own keys and values (B, 2, N, T * n, d) there to all that
                the tokens may attend to, (B, 2, N, M, d); None: there are none but their own.

        Returns:
            (B, T, h, w, C) float32, from which and from the input the latents can be told (see `Noising`).
        """
        config, batch = self.config, len(shown.latents)
        noising = self.noising(shown.level)
        parts = (shown.latents * noising.inner, shown.before)
        given = torch.cat([to_tokens(part, config.patch) for part in parts], dim=-1)
        clean = torch.arange(shown.level.shape[1], device=given.device) < shown.past
        extra = clean[:, None].expand(batch, -1, -1).float()
        features = self.embed_noise(noising.told)
        action = within_bounds(shown.action, self.low, self.extent)
        command = torch.cat([action, shown.travel / self.travel_scale], dim=-1)
        actions, known = None, shown.known[..., None] & command.isfinite().all(dim=-1, keepdim=True)
        command = torch.where(known, command, 0)
        if config.action_injection == "concat":
            extra = torch.cat([extra, command, known], dim=-1)
        else:
            told_of = self.embed_action(command.to(self.dtype))
            actions = torch.where(known, told_of, self.embed_no_action.weight.to(told_of.dtype))
            if config.action_injection == "adaln":
                features, actions = features + actions, None
        if config.shortcut:
            features = features + self.embed_step(shown.step)
        features = F.silu(features)
        conditions = Conditions(features, self.modulate(features))
        extra = extra[:, :, None].expand(-1, -1, given.shape[2], -1)
        x = self.embed_patch(torch.cat([given, extra], dim=-1).to(self.dtype))
        absolute = sight.absolute.unflatten(1, x.shape[1:3])
        if text is None and actions is not None:
            text = self.silence(batch)
        pieces = [] if text is None else self._pieces_of_text(shown, text.bias, told, actions is not None)
        for i, block in enumerate(self.blocks):
            heard = None
            if text is not None:
                seen = text.layers[i] if actions is None else torch.cat([text.layers[i], block.read(actions)], dim=3)
                heard = Heard(seen, pieces)
            x = block(x + absolute, conditions, sight, heard, look and partial(look, i))
        shift, scale = self.modulate_last(features)[:, :, None].chunk(2, dim=-1)
        out = self.head(self.norm(x) * (1 + scale) + shift).float()
        return from_tokens(out, config.patch, config.grid)

    def _pieces_of_text(self, shown: Shown, bias: Tensor, told: Tensor | None, actions: bool) -> list[Piece]:
        """What frames attend to among the words (B, 1, 1, 1 + W) and the actions, one a frame, that follow these."""
        secret = bias
        if told is not None:  # who is told nothing attends to what stands for it
            word = torch.arange(bias.shape[-1], device=bias.device) > 0
            secret = bias.masked_fill(word & ~told[:, None, None, None], float("-inf"))
        num_tokens, num_words = self.config.frame_tokens, bias.shape[-1]
        past, num_frames = shown.past, shown.level.shape[1]
        if not actions:
            streams = ((past, bias), (num_frames - past, secret))
            return [Piece(count * num_tokens, [slice(None)], mine) for count, mine in streams if count]
        return [
            Piece(
                num_tokens,
                [slice(0, num_words), slice(num_words + k, num_words + k + 1)],
                F.pad(bias if k < past else secret, (0, 1)),
            )
            for k in range(num_frames)
        ]

    def _pieces_of_clip(self, num_clean: int, num_noisy: int, chunk: int, copies: int = 1) -> list[Piece]:
        """What each frame of the past attends to, and then each copy, which are those of the last frames."""
        num_tokens, window = self.config.frame_tokens, self.config.window
        first = 1 if num_clean else 0  # the frame of the first copy
        seen = [[*frames_in_sight(frame, window), frame] for frame in range(num_clean)]
        for before, k in product(range(copies), range(num_noisy)):
            begun, own = k - k % chunk, num_clean + before * num_noisy
            seen.append([*frames_in_sight(first + begun, window), *range(own + begun, own + k + 1)])
        return [Piece(num_tokens, runs(frames, num_tokens), None) for frames in seen]

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss.

        Args:
            batch: `latents` (B, T, h, w, C) float of frames, or of single ones (T = 1), which are then told from the
                text; `action` (B, T, A), sent before the next frame; `seed`, int64 scalar for what is random; and, if
                wanted, `text` (B, W, text_dim), `fps` (B,), `travel` (B, T, P) commanded from the first to each frame,
                by default the sum of the actions, `times` (B, T) int64, steps since the first frame, by default one a
                frame, `seen` (B, T, h, w, C), what the past is shown as where that is not what was, and `watched`
                (B, T, h, w) bool, cells that weigh more. A frame that does not follow the one before it is only seen,
                not learnt.

        Raises:
            ValueError: the clip is longer than the rotary positions cover.
        """
        config, fps = self.config, batch.get("fps")
        latents = self.normalise(batch["latents"])
        rows, time = latents.shape[:2]
        steps = batch.get("times", torch.arange(time, device=latents.device)[None])
        config.rope.check_span(int(steps.max()) + 1, fps)
        given, past = min(1, time - 1), time - 1
        copied = torch.arange(given, time).repeat(config.copies)
        target = latents[:, copied]
        draws = self._draw(target, batch["seed"])
        frame = torch.cat([torch.arange(past), copied]).to(latents.device)
        last = torch.cat([torch.arange(past), copied - (copied - given) % draws.chunk]) - 1
        action = F.pad(batch["action"][:, :-1], (0, 0, 1, 0))
        travel = batch.get("travel", action[..., : config.actions.travel_dim].cumsum(dim=1))
        hidden = (torch.arange(len(frame), device=latents.device) >= past) & ~draws.told[:, None]
        level = torch.cat([draws.level[1, :, :past], draws.level[0]], dim=1)
        noising = self.noising(level)
        noise = torch.cat([draws.noise[1, :, :past], draws.noise[0]], dim=1)
        past_latents = self.normalise(batch["seen"]) if "seen" in batch else latents
        clean = torch.cat([past_latents[:, :past], target], dim=1)
        noised = clean * noising.scale + level[..., None, None, None] * noise
        shown = Shown(
            noised,
            noised[:, last] * (last >= 0).to(noised)[:, None, None, None],
            level,
            past,
            action[:, frame],
            travel[:, frame],
            (frame > 0) & ~hidden,
            F.pad(draws.step, (past, 0)),
        )
        times = steps[:, frame] * (1 if fps is None else NATIVE_FPS / fps[:, None])
        sight = self.sight(times, self._pieces_of_clip(past, time - given, draws.chunk, config.copies))
        text = None if batch.get("text") is None else self.read(batch["text"])

        def predict(shown: Shown) -> Tensor:
            return self.run(shown, sight, text, draws.told)[:, past:]

        mine = Noising(*(value[:, past:] for value in noising))
        wanted = (target - mine.skip * shown.latents[:, past:]) / mine.out
        if config.shortcut:
            learns = (draws.step > 0)[..., None, None, None]
            wanted = torch.where(learns, self._two_half_steps(predict, shown, draws.step, past), wanted)
        cells = (predict(shown) - wanted).square().mean(dim=-1)
        plain = error = cells.mean(dim=(2, 3))
        if "watched" in batch:
            weight = torch.where(batch["watched"][:, copied], config.watched_weight, 1.0)
            error = (cells * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))
        log_error = self.head_log_error(level_waves(mine.told).to(self.dtype)).float().squeeze(-1)
        follows = steps.diff(dim=1) == 1 if given else steps == 0
        follows = follows & follows[:, last[past : past + time - given] + 1 - given]  # and so does its chunk
        learnt = follows.repeat(1, config.copies).expand_as(error).to(error)

        def mean(value: Tensor) -> Tensor:
            return (value * learnt).sum() / learnt.sum().clamp(min=1)

        denoised = plain * mine.out.flatten(1).square()
        metrics = {"error": mean(plain).detach(), "denoised": mean(denoised).detach()}
        return mean(error * (-log_error).exp() + log_error), metrics

    @torch.no_grad()
    def _two_half_steps(self, predict: Callable[[Shown], Tensor], shown: Shown, step: Tensor, past: int) -> Tensor:
        """What frames that learn to go in one step should predict, (B, T', h, w, C); the others stay where they are."""

        def velocity(x: Tensor, level: Tensor, half: Tensor) -> Tensor:
            small = half * (half * FINEST_STEPS > 1)
            return predict(
                shown._replace(
                    latents=torch.cat([shown.latents[:, :past], x], dim=1),
                    level=torch.cat([shown.level[:, :past], level], dim=1),
                    step=F.pad(small, (past, 0)),
                )
            )

        return two_half_steps(velocity, shown.latents[:, past:], shown.level[:, past:], step)

    # A generator is new in every step: one that reached compiled code would have it compiled anew in every step.
    @torch.compiler.disable(recursive=False)
    def _draw(self, target: Tensor, seed: Tensor) -> Draws:
        """What is random in a step, for the frames (B, T', h, w, C) that are denoised.

        Half of the batches have chunks of one frame, as a rollout step by step; the others of a larger divisor of
        `chunk`.
        """
        config, device = self.config, target.device
        generator = torch.Generator(device=device).manual_seed(int(seed))
        normal = partial(torch.randn, generator=generator, device=device)
        uniform = partial(torch.rand, generator=generator, device=device)
        larger = [size for size in range(2, config.chunk + 1) if config.chunk % size == 0]
        pick = float(uniform(())) * 2 - 1
        chunk = larger[int(pick * len(larger))] if larger and pick >= 0 else 1
        noise, logs, frames = normal((2, *target.shape)), normal((2, *target.shape[:2])), target.shape[:2]
        noisiest, between = uniform(frames) < NOISIEST, uniform(frames)
        log_level = logs[0] * config.noise_std + config.noise_mean
        high = config.noise_mean + 2 * config.noise_std
        # Sampling begins where such draws hardly come.
        if config.formulation == "edm":
            highest = math.log(config.sigma_max)
            level = torch.where(noisiest, high + (highest - high) * between, log_level).exp()
        else:
            high = 1 / (1 + math.exp(-high))
            time = torch.where(noisiest, high + (1 - high) * between, log_level.sigmoid())
            level = config.shift * time / (1 + (config.shift - 1) * time)
        past = self.level_of((logs[1] * config.context_std + config.context_mean).exp())
        told = uniform((frames[0],)) >= config.untold
        step = torch.zeros(frames, device=device)
        if config.shortcut:
            # Steps of 1, 1/2, ... down to twice the finest, from where as many of them lead to the data.
            learns = uniform(frames) < config.shortcut
            halvings = (uniform(frames) * (FINEST_STEPS.bit_length() - 1)).floor()
            size = 0.5**halvings
            level = torch.where(learns, ((uniform(frames) / size).floor() + 1) * size, level)
            step = size * learns
        return Draws(chunk, noise, torch.stack([level, past]), told, step)
