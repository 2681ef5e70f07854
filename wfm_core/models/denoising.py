"""Generation with the diffusion network: frame after frame, or a few together, out of noise."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wfm_core.models.diffusion import Diffusion, Shown
from wfm_core.models.diffusion_config import FINEST_STEPS
from wfm_core.models.frame_cache import InSight, append, empty_cache, in_sight
from wfm_core.models.positions import NATIVE_FPS
from wfm_core.models.transformer_blocks import Piece, hiding, keys_then_values, text_entries, text_in
from wfm_core.samplers import SAMPLERS, guided, karras_levels, shifted_levels
from wfm_core.sampling import row_normal
from wfm_core.world_model import ModelState


class DiffusionModel(Diffusion):
    """A `Diffusion` that generates; its state is a value (see `wfm_core.world_model.ModelState`).

    The state holds the keys and values of the first frame and of the last window - 1 frames, however long the rollout.
    """

    @torch.no_grad()
    def start(
        self,
        latents: Tensor,
        actions: Tensor,
        seeds: Sequence[int],
        *,
        text: Tensor | None = None,
        fps: float = NATIVE_FPS,
    ) -> ModelState:
        """Prefill the context.

        Without any, the next frame is the first one, imagined from the text alone, by a model that was trained with
        text and single frames (`image_every`).

        Args:
            latents: (B, T, h, w, C) of T >= 0 frames.
            actions: (B, T - 1, A) physical, between them, NaN where not known; none for T = 0.
            seeds: B ints; a row's noise depends on its own only.
            text: (B, W, text_dim) features, zero where there is no word; None: no text.
            fps: frames a second.

        Raises:
            ValueError: there is text, but the model reads none; or fps is not positive.
        """
        config = self.config
        state = empty_cache(config, config.num_heads, config.frame_tokens, seeds, fps, self.norm.weight)
        rows, steps = len(latents), config.actions.travel_dim
        state |= {"last": latents.new_zeros(rows, *self.latent_shape), "travel": latents.new_zeros(rows, steps)}
        if text is not None:
            state |= text_entries(self.read(text))
        return self._remember(state, self.normalise(latents), F.pad(actions, (0, 0, 1, 0)))

    @torch.no_grad()
    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Predict the next frame: physical action (B, A) to state, latents (B, h, w, C) and uncertainty (B,).

        The uncertainty is that of `step_chunk`.
        """
        state, latents, uncertainty = self.step_chunk(state, action[:, None])
        return state, latents[:, 0], uncertainty[:, 0]

    @torch.no_grad()
    def step_chunk(self, state: ModelState, actions: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Predict the next c frames together.

        Args:
            state: left unchanged.
            actions: (B, c, A) physical, c at most the `chunk` of the configuration; no action leads to the first frame
                of a rollout.

        Returns:
            The state after the last frame, the latents (B, c, h, w, C) float32, and the uncertainty (B, c) in [0, 1).
            The first thing that is denoised, out of nothing but noise, is the mean of all frames that may come; the
            uncertainty is v / (1 + v), v the squared distance of the sample from there over the variance of all
            latents: one sample's word on how far the frames that may come lie apart. It sees what the model doubts, not
            where the model is wrong; a model of one step, whose sample that mean is, knows no doubt at all.

        Raises:
            ValueError: there are more actions than frames may be denoised together.
        """
        config, (batch, count) = self.config, actions.shape[:2]
        if not 1 <= count <= config.chunk:
            raise ValueError(f"actions must be of 1 to {config.chunk} frames, the model's chunk, got {count}")
        if count > 1 and not state["count"].all():
            raise ValueError(f"the first frame of a rollout comes alone, got actions of {count} frames before it")
        sight = in_sight(state, config, count)
        before = state["last"][:, None].expand(-1, count, *self.latent_shape)
        led_to = state["count"][:, None] + torch.arange(count, device=actions.device) > 0
        actions = torch.where(led_to[..., None], actions, 0)
        travel = state["travel"][:, None] + self._moves(actions).cumsum(dim=1)
        size = config.frame_tokens * config.token_dim
        draws = [row_normal(state["seed"], state["step"] + k, 0, size) for k in range(count)]
        noise = torch.stack(draws, dim=1).unflatten(-1, self.latent_shape)
        told_step = 1 / config.num_steps if config.shortcut and config.num_steps < FINEST_STEPS else 0.0
        predictions: list[Tensor] = []

        def denoise(x: Tensor, level: float, known: bool = True) -> Tensor:
            levels = torch.full((batch, count), level, device=x.device)
            noising = self.noising(levels)
            step = torch.full_like(levels, told_step)
            shown = Shown(x, before, levels, 0, actions, travel, led_to & known, step)
            out, _ = self._pass(state, sight, shown, torch.full_like(led_to[:, 0], known))
            return noising.skip * x + noising.out * out

        def told(x: Tensor, level: float) -> Tensor:
            predictions.append(denoise(x, level))
            return predictions[-1]

        if config.formulation == "edm":
            levels = karras_levels(config.num_steps, config.sigma_min, config.sigma_max, config.rho)
        else:
            levels = shifted_levels(config.num_steps, config.shift)
        way = guided(told, lambda x, level: denoise(x, level, known=False), config.guidance)
        sample = SAMPLERS[config.sampler](way, noise, levels)
        spread = (sample - predictions[0]).square().mean(dim=(2, 3, 4)) / config.sigma_data**2
        state = {**self._remember(state, sample, actions), "step": state["step"] + count}
        return state, self.restore(sample), spread / (1 + spread)

    def _remember(self, state: ModelState, normalised: Tensor, actions: Tensor) -> ModelState:
        """Append frames (B, T, h, w, C) and the actions (B, T, A) that led to them to the cache."""
        level = self.level_of(normalised.new_full((len(normalised), 1), self.config.context_sigma))
        shown = normalised * self.noising(level).scale
        for k in range(normalised.shape[1]):
            known, step = state["count"][:, None] > 0, torch.zeros_like(level)
            frame = slice(k, k + 1)
            travel = state["travel"] + self._moves(actions[:, k])
            before = state["last"][:, None]
            one = Shown(shown[:, frame], before, level, 1, actions[:, frame], travel[:, None], known, step)
            _, own = self._pass(state, in_sight(state, self.config), one)
            state = append(state, self.config, own) | {"last": shown[:, k], "travel": travel}
        return state

    def _moves(self, actions: Tensor) -> Tensor:
        """The steps in actions (..., A), (..., P), none where they are not known."""
        return actions[..., : self.config.actions.travel_dim].nan_to_num()

    def _pass(
        self, state: ModelState, sight: InSight, shown: Shown, told: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the network over frames that follow the cached ones; `told` is as for `run`.

        Returns:
            What the network gives (B, T, h, w, C), and of each block the frames' keys and values (B, 2, N, T * n, d).
        """
        num_frames, num_tokens = shown.level.shape[1], self.config.frame_tokens
        times = sight.times + torch.arange(num_frames, device=sight.times.device) * (NATIVE_FPS / state["fps"])[:, None]
        bias = hiding(sight.seen, self.dtype)[:, None, None]
        ends = [(k + 1) * num_tokens for k in range(num_frames)]
        pieces = [Piece(num_tokens, [slice(0, bias.shape[-1] + end)], F.pad(bias, (0, end))) for end in ends]
        kept: list[Tensor] = []

        def look(i: int, own: Tensor) -> Tensor:
            kept.append(own)
            return keys_then_values([*sight.layers[i], own])

        text = text_in(state, self.config.num_layers)
        return self.run(shown, self.sight(times, pieces), text, told, look), kept
