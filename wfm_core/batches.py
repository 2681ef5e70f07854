"""Batches that world models are trained on, as pure functions of the step number, drawn from encoded clip caches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from wfm_core.data.actions import BRIDGE_ACTIONS, ActionSpace
from wfm_core.data.camera_rays import FOCALS, POSES, rays_ahead
from wfm_core.data.clip_cache import ClipCache, Joined
from wfm_core.data.sampler import ClipSampler
from wfm_core.models.motion import Contact, is_blocked
from wfm_core.models.text import TextEncoder
from wfm_core.tokenizers.batches import FROM_HERE_FRACTION
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.train import Batch

UNTOLD_FRACTION = 0.1
"""Fraction of the clips whose text is withheld, so that a model that reads also works without."""


def commanded_travel(steps: np.ndarray, starts: np.ndarray, lengths: np.ndarray, contact: np.ndarray) -> np.ndarray:
    """Sum of the pose deltas commanded before each frame of its episode, but for those that came to nothing.

    Args:
        steps: (N, P) the leading dimensions of a clip cache's actions that add up; row t is sent after frame t. NaN
            counts as no step.
        starts: (E,) first row of each episode.
        lengths: (E,) rows of each episode.
        contact: (N,) `Contact` of each frame.

    Returns:
        (N, P) float32, zero at each episode's first frame.
    """
    came_to_nothing = np.append(is_blocked(torch.from_numpy(contact[1:])).numpy(), False)
    deltas = np.where(came_to_nothing[:, None] | np.isnan(steps), 0, steps.astype(np.float64))
    before = np.concatenate([np.zeros((1, steps.shape[1])), np.cumsum(deltas, axis=0)[:-1]])
    return (before - np.repeat(before[starts], lengths, axis=0)).astype(np.float32)


def joined_actions(caches: Sequence[ClipCache], hidden: bool) -> np.ndarray:
    """Actions (N, A) of all rows of some caches, NaN if they are to be `hidden`."""
    actions = np.concatenate([cache.columns["actions"] for cache in caches])
    return np.full_like(actions, np.nan) if hidden else actions


class DynamicsBatches:
    """Clips of tokens and actions, for `Autoregressive.forward`, every window as likely as any other, or some sought.

    Windows that show a grasp must not be drawn more often than those that show a miss, or a model that cannot tell the
    two apart imagines grasps. Those that show an attempt, whatever comes of it, may.
    """

    def __init__(
        self,
        caches: Sequence[ClipCache],
        tokens: Sequence[np.ndarray],
        *,
        clip_length: int,
        batch_size: int,
        seed: int,
        watched: Sequence[np.ndarray],
        contact: Sequence[np.ndarray],
        imagined: Sequence[np.ndarray | None],
        sought: Sequence[np.ndarray] | None = None,
        sought_share: float = 0.0,
        places: Sequence[np.ndarray] | None = None,
        space: ActionSpace = BRIDGE_ACTIONS,
        action_free: bool = False,
        text_encoder: TextEncoder | None = None,
        rays: bool = False,
    ) -> None:
        """Join the caches.

        Args:
            caches: clip caches; one may come twice, with and without `imagined`.
            tokens: per cache (N, n, C) uint8, from `encode_cache`.
            clip_length: frames of a clip, the anchor among them.
            batch_size: clips of a batch.
            seed: of the sequence of batches.
            watched: per cache (N, n) bool, the cells to which the loss attends.
            contact: per cache (N,) `Contact` of each frame.
            imagined: per cache (N, n, C) uint8, from `wfm_core.rollouts.keep_imagined`, or None. Where given, clips
                show these; what comes next is real all the same.
            sought: per cache (N,) bool, frames that a share of the clips show; see `ClipSampler`.
            sought_share: see there.
            places: per cache (N, K, 3), for `loss_of_places`.
            space: of the actions.
            action_free: hide the actions.
            text_encoder: reads the episodes' instructions, each once, now; None: no text.
            rays: tell from where each frame is seen.

        Raises:
            ValueError: an instruction is too long for the encoder, or it is not known from where frames are seen.
        """
        lengths = np.concatenate([cache.lengths for cache in caches])
        sizes: dict[str, Any] = {"clip_length": clip_length + 1, "batch_size": batch_size, "seed": seed}
        self.sampler = ClipSampler(lengths, **sizes, sought=sought, sought_share=sought_share)
        self.starts = np.cumsum(lengths) - lengths
        self.tokens = Joined(tokens)
        self.seen = Joined([t if i is None else i for t, i in zip(tokens, imagined, strict=True)])
        self.imagined = np.concatenate([np.full(len(t), i is not None) for t, i in zip(tokens, imagined, strict=True)])
        self.watched = np.concatenate(list(watched))
        self.contact = np.concatenate(list(contact)).astype(np.int64)
        self.actions, self.travel_dim = joined_actions(caches, action_free), space.travel_dim
        self.travel = commanded_travel(self.actions[:, : self.travel_dim], self.starts, lengths, self.contact)
        self.seed = seed
        self.places = None if places is None else np.concatenate(list(places))
        self.told = None if text_encoder is None else Told(caches, text_encoder)
        self.cameras = {}
        if rays:
            self.side = round(tokens[0].shape[1] ** 0.5)
            self.cameras = {
                name: np.concatenate([cache.columns[name] for cache in caches])
                for name in (POSES, FOCALS)
                if all(name in cache.columns for cache in caches)
            }
            rays_ahead(self.cameras, self.starts[:1], self.starts[:1], (1, 1))  # says what is missing

    def __call__(self, step: int) -> Batch:
        """Return the batch that `Autoregressive.forward` describes.

        A clip's anchor is the first frame of its episode, or the frame just before the clip, as when a rollout starts
        in the middle; an imagined clip's anchor is always the first frame, where its rollout began.
        """
        first = self.sampler.batch(step)
        rng = np.random.default_rng([self.seed, step, 1])
        from_here = rng.random(len(first)) < FROM_HERE_FRACTION
        from_here &= ~self.imagined[first]
        anchor = np.where(from_here, first, self.starts[np.searchsorted(self.starts, first, side="right") - 1])
        rows = np.concatenate([anchor[:, None], first[:, None] + np.arange(1, self.sampler.clip_length - 1)], axis=1)
        previous = self.actions[np.maximum(rows - 1, 0)]
        previous[:, 0] = self.actions[anchor]
        previous[:, 0, : self.travel_dim] = 0
        batch = {} if self.told is None else {"text": self.told(first, rng)}
        if self.cameras:
            rays = rays_ahead(self.cameras, rows, anchor[:, None], (self.side, self.side))
            batch["rays"] = torch.from_numpy(rays)
        if self.places is not None:
            batch["places"] = torch.from_numpy(self.places[rows])
        return batch | {
            "tokens": torch.from_numpy(self.seen[rows]),
            "next_tokens": torch.from_numpy(self.tokens[rows + 1]),
            "next_watched": torch.from_numpy(self.watched[rows + 1]),
            "contact": torch.from_numpy(self.contact[rows]),
            "next_contact": torch.from_numpy(self.contact[rows + 1]),
            "action": torch.from_numpy(self.actions[rows]),
            "previous_action": torch.from_numpy(previous),
            "travel": torch.from_numpy(self.travel[rows] - self.travel[anchor][:, None]),
            "times": torch.from_numpy(rows - anchor[:, None]),
            "seed": torch.tensor(self.seed * 1_000_003 + step),
        }


class Told:
    """The instructions of clips, as features; those of `UNTOLD_FRACTION` are withheld."""

    def __init__(self, caches: Sequence[ClipCache], encoder: TextEncoder) -> None:
        """Read the instructions of all episodes, each once.

        Raises:
            ValueError: one is too long for the encoder.
        """
        instructions = [episode["instruction"] for cache in caches for episode in cache.episodes]
        distinct, self.instruction = np.unique(instructions, return_inverse=True)
        self.text = encoder(distinct.tolist())
        lengths = np.concatenate([cache.lengths for cache in caches])
        self.starts = np.cumsum(lengths) - lengths

    def __call__(self, rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """Features (B, W, D) of the instructions of clips that begin at rows (B,), zero where they are withheld."""
        told = torch.from_numpy(rng.random(len(rows)) >= UNTOLD_FRACTION)
        episode = np.searchsorted(self.starts, rows, side="right") - 1
        return self.text[self.instruction[episode]] * told[:, None, None]


class TokenClipBatches:
    """Clips of consecutive frames' tokens and actions, for `Transformer.forward`, every window as likely as any other.

    Every `image_every`-th batch holds single frames instead, as many as there are in a batch of clips.
    """

    encoded = "tokens"

    def __init__(
        self,
        caches: Sequence[ClipCache],
        tokens: Sequence[np.ndarray],
        *,
        clip_length: int,
        batch_size: int,
        seed: int,
        text_encoder: TextEncoder | None = None,
        image_every: int = 0,
        action_free: bool = False,
    ) -> None:
        """Join the caches.

        Args:
            caches: clip caches.
            tokens: per cache (N, n, C) uint8, from `encode_cache`.
            clip_length: frames of a clip.
            batch_size: clips of a batch.
            seed: of the sequence of batches.
            text_encoder: reads the episodes' instructions, each once, now; None: no text.
            image_every: every so many batches one of single frames, the first one among them; 0 for none.
            action_free: hide the actions.

        Raises:
            ValueError: an instruction is too long for the encoder.
        """
        lengths = np.concatenate([cache.lengths for cache in caches])
        self.sampler = ClipSampler(lengths, clip_length=clip_length, batch_size=batch_size, seed=seed)
        self.starts = np.cumsum(lengths) - lengths
        self.frames = Joined(tokens)
        self.actions = joined_actions(caches, action_free)
        self.seed, self.image_every = seed, image_every
        self.told = None if text_encoder is None else Told(caches, text_encoder)

    def __call__(self, step: int) -> Batch:
        """Return the batch that `Transformer.forward` describes."""
        rng = np.random.default_rng([self.seed, step, 1])
        length, first = self.sampler.clip_length, self.sampler.batch(step)
        if self.image_every > 0 and step % self.image_every == 0:
            length, first = 1, rng.integers(len(self.frames), size=length * len(first))
        rows = first[:, None] + np.arange(length)
        batch = self._clips(rows, rng) | {
            "action": torch.from_numpy(self.actions[rows]),
            "seed": torch.tensor(self.seed * 1_000_003 + step),
        }
        if self.told is not None:
            batch["text"] = self.told(first, rng)
        return batch

    def _clips(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """What a batch says of the frames of rows (B, T), those of a clip all of one cache."""
        return {self.encoded: torch.from_numpy(self.frames[rows])}


class LatentClipBatches(TokenClipBatches):
    """As `TokenClipBatches`, but of latents (N, h, w, C) float16, for `Diffusion.forward` and `Irasim.forward`.

    Rollouts go on seeing their first frame. So the first frame of a clip is that of its episode where all that lies
    between fits into `span` frames, but for a fraction of the clips, whose rollouts may begin anywhere.
    """

    encoded = "latents"

    def __init__(
        self,
        caches: Sequence[ClipCache],
        latents: Sequence[np.ndarray],
        *,
        space: ActionSpace = BRIDGE_ACTIONS,
        span: int = 0,
        imagined: Sequence[np.ndarray | None] = (),
        watched: Sequence[np.ndarray] = (),
        **more: Any,
    ) -> None:
        """Join the caches; see there.

        Args:
            caches: clip caches; one may come twice, with and without `imagined`.
            latents: per cache (N, h, w, C) float16, from `encode_cache`.
            space: of the actions.
            span: of the rotary positions; 0 for clips without a gap.
            imagined: per cache (N, h, w, C), from `wfm_core.rollouts.keep_imagined`, or None; empty for none. Where
                given, clips that begin with their episode show these; what comes next is real all the same.
            watched: per cache (N, h * w) bool, the cells to which the loss attends; empty for none.
            more: as there.
        """
        super().__init__(caches, latents, **more)
        self.span = span
        cells = [mine.reshape(real.shape[:-1]) for mine, real in zip(watched, latents, strict=bool(watched))]
        self.watched = Joined(cells) if cells else None
        imagined = list(imagined) or [None] * len(caches)
        self.seen = Joined([real if own is None else own for real, own in zip(latents, imagined, strict=True)])
        self.imagined = np.array([own is not None for own in imagined])
        lengths = np.diff(self.starts, append=len(self.actions))
        steps, contact = self.actions[:, : space.travel_dim], np.full(len(self.actions), Contact.UNKNOWN)
        self.travel = commanded_travel(steps, self.starts, lengths, contact)

    def _clips(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        start = self.starts[np.searchsorted(self.starts, rows[:, 0], side="right") - 1]
        if self.span and rows.shape[1] > 1:
            here = (rng.random(len(rows)) < FROM_HERE_FRACTION) & ~self.imagined[self.frames.part_of(rows)]
            back = (rows[:, -1] - start < self.span) & ~here
            rows = np.concatenate([np.where(back, start, rows[:, 0])[:, None], rows[:, 1:]], axis=1)
        batch = super()._clips(rows, rng) | {
            "travel": torch.from_numpy(self.travel[rows] - self.travel[rows[:, :1]]),
            "times": torch.from_numpy(rows - rows[:, :1]),
        }
        if self.watched is not None:
            batch["watched"] = torch.from_numpy(self.watched[rows])
        if self.imagined.any():  # rollouts begin with what is real
            begun = torch.from_numpy(rows[:, 0] == start)[:, None, None, None, None]
            batch["seen"] = torch.where(begun, torch.from_numpy(self.seen[rows]), batch[self.encoded])
        return batch


class DecoderBatches:
    """Single frames as tokens and as latents, each with a reference, for `LatentDenoiser.forward`."""

    def __init__(
        self,
        caches: Sequence[ClipCache],
        tokens: Sequence[np.ndarray],
        latents: Sequence[np.ndarray],
        codec: LatentCodec,
        batch_size: int,
        seed: int,
    ) -> None:
        """Join the caches.

        Args:
            caches: clip caches.
            tokens: per cache (N, n, C) uint8, from `encode_cache` with the discrete tokenizer.
            latents: per cache (N, h, w, C) float16, likewise with the continuous one.
            codec: of the discrete tokenizer.
            batch_size: frames of a batch.
            seed: of the sequence of batches.
        """
        lengths = np.concatenate([cache.lengths for cache in caches])
        self.starts = np.cumsum(lengths) - lengths
        self.tokens, self.latents = np.concatenate(list(tokens)), np.concatenate(list(latents))
        self.codec, self.batch_size, self.seed = codec, batch_size, seed

    def __call__(self, step: int) -> Batch:
        """Return the batch that `LatentDenoiser.forward` describes.

        The reference is the first frame of the frame's episode, or one between the two.
        """
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(len(self.tokens), size=self.batch_size)
        first = self.starts[np.searchsorted(self.starts, rows, side="right") - 1]
        since = np.where(rng.random(len(rows)) < FROM_HERE_FRACTION, rng.random(len(rows)), 0)
        reference = first + (since * (rows - first)).astype(np.int64)
        return {
            "latents": torch.from_numpy(self.latents[rows]),
            "codes": self.codec.unpack(self.tokens[rows]),
            "reference_latents": torch.from_numpy(self.latents[reference]),
            "reference_codes": self.codec.unpack(self.tokens[reference]),
            "seed": torch.tensor(self.seed * 1_000_003 + step),
        }
