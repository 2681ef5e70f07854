"""Training batches as pure functions of the step number, drawn from clip caches."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.data.sampler import ClipSampler, first_rows_of_clips
from wfm_core.models.motion import TRAVEL_DIM, is_blocked
from wfm_core.models.text import TextEncoder
from wfm_core.tokenizers.patch import PatchTokenizer, to_float
from wfm_core.train import Batch

FROM_HERE_FRACTION = 0.3
"""Fraction of samples whose rollout begins in the middle of the episode: what stands for its first frame is later."""
UNTOLD_FRACTION = 0.1
"""Fraction of the clips whose text is withheld, so that a model that reads also works without."""
SMALLEST_CROP = 0.7  # of a frame's side


def median_backgrounds(cache: ClipCache, num_frames: int = 301) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the still background of each scene as a per-pixel median.

    Episodes of one instruction share a scene; one without an instruction has its own.

    Args:
        cache: where the frames are.
        num_frames: how many random frames of each scene the median is taken over.

    Returns:
        backgrounds (G, H, W, 3) uint8 and the (E,) int64 background of each episode.
    """
    scenes = [episode["instruction"] or episode["episode_id"] for episode in cache.episodes]
    names = sorted(set(scenes))
    group = np.array([names.index(scene) for scene in scenes])
    rng = np.random.default_rng(0)
    backgrounds = []
    for g in range(len(names)):
        episodes = rng.choice(np.flatnonzero(group == g), num_frames)
        rows = cache.starts[episodes] + (rng.random(num_frames) * cache.lengths[episodes]).astype(np.int64)
        backgrounds.append(np.median(cache.frames[np.sort(rows)], axis=0).astype(np.uint8))
    return np.stack(backgrounds), group


class Mixture:
    """Which cache each sample of a batch comes from."""

    def __init__(
        self, caches: Sequence[ClipCache], augmented: Sequence[ClipCache] = (), augmented_fraction: float = 0.2
    ) -> None:
        """Join caches that are seen as they are and others that are augmented.

        Args:
            caches: drawn from in proportion to their frames.
            augmented: likewise; their samples are cropped, mirrored and brightened.
            augmented_fraction: share of the samples that come from these, where there are both.

        Raises:
            ValueError: frames differ in size (names the cache), or the fraction is none.
        """
        self.caches = [*caches, *augmented]
        self.is_augmented = np.array([False] * len(caches) + [True] * len(augmented))
        for cache in self.caches:
            if cache.frames.shape[1:] != self.caches[0].frames.shape[1:]:
                sizes = [tuple(each.frames.shape[1:3]) for each in (self.caches[0], cache)]
                raise ValueError(
                    f"{cache.directory}: frames must be {sizes[0]} as in {self.caches[0].directory}, got {sizes[1]}"
                )
        if not 0 <= augmented_fraction <= 1:
            raise ValueError(f"augmented_fraction must lie in [0, 1], got {augmented_fraction}")
        sizes = np.array([len(cache.frames) for cache in self.caches], dtype=np.float64)
        if len(caches) and len(augmented):
            for kind, share in ((self.is_augmented, augmented_fraction), (~self.is_augmented, 1 - augmented_fraction)):
                sizes[kind] *= share / sizes[kind].sum()
        self.shares = sizes / sizes.sum()

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return the cache of each of `count` samples, (count,) int64, in ascending order."""
        return np.sort(rng.choice(len(self.caches), count, p=self.shares))


class TokenizerBatches:
    """Random single frames, each with a reference and its background, for `PatchTokenizer.forward`."""

    def __init__(self, mixture: Mixture, batch_size: int, seed: int) -> None:
        self.mixture, self.batch_size, self.seed = mixture, batch_size, seed
        self.backgrounds = [median_backgrounds(cache) for cache in mixture.caches]

    def __call__(self, step: int) -> Batch:
        """Return `frames`, `reference` and `background`, each (B, H, W, 3) uint8, and `seed`.

        The reference is the first frame of the frame's episode, or one between the two.
        """
        rng = np.random.default_rng([self.seed, step])
        picks = self.mixture.draw(rng, self.batch_size)
        since = np.where(rng.random(self.batch_size) < FROM_HERE_FRACTION, rng.random(self.batch_size), 0)
        triples = []
        for k in np.unique(picks):
            cache, (background, group) = self.mixture.caches[k], self.backgrounds[k]
            rows = np.sort(rng.integers(len(cache.frames), size=(picks == k).sum()))
            episodes = np.searchsorted(cache.starts, rows, side="right") - 1
            first = cache.starts[episodes]
            reference = cache.frames[first + (since[picks == k] * (rows - first)).astype(np.int64)]
            drawn = np.stack([cache.frames[rows], reference, background[group[episodes]]], axis=1)
            triples.append(
                np.stack([augmented(each, rng) for each in drawn]) if self.mixture.is_augmented[k] else drawn
            )
        frames, reference, background = torch.from_numpy(np.concatenate(triples)).unbind(1)
        return {
            "frames": frames,
            "reference": reference,
            "background": background,
            "seed": torch.tensor(self.seed * 1_000_003 + step),
        }


def check_size(cache: ClipCache, image_size: int) -> None:
    """Check that frames have the size that a tokenizer takes.

    Raises:
        ValueError: they do not; names the cache.
    """
    found = cache.frames.shape[1:3]
    if found != (image_size, image_size):
        raise ValueError(f"{cache.directory}: frames must be {image_size} x {image_size}, got {found[0]} x {found[1]}")


@torch.no_grad()
def encode_cache(tokenizer: PatchTokenizer, cache: ClipCache, batch_size: int = 256) -> np.ndarray:
    """Encode every frame of a cache once and keep the tokens beside it, under a name that hashes the encoder's weights.

    Args:
        tokenizer: float32, in evaluation mode.
        cache: where the frames are.
        batch_size: frames encoded at once.

    Returns:
        (N, n, C) uint8 level indices, a memory map.

    Raises:
        ValueError: the frames have another size than the tokenizer's.
    """
    check_size(cache, tokenizer.config.image_size)
    digest = hashlib.sha256()
    for value in tokenizer.encoder.state_dict().values():
        digest.update(value.numpy().tobytes())
    path = cache.directory / f"tokens.{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        height, width, channels = tokenizer.latent_shape
        tokens = np.empty((len(cache.frames), height * width, channels), dtype=np.uint8)
        for start in tqdm(range(0, len(tokens), batch_size), desc=f"encoding {cache.directory}"):
            frames = torch.from_numpy(np.array(cache.frames[start : start + batch_size]))
            indices = tokenizer.fsq.to_indices(tokenizer.encode(to_float(frames)))
            tokens[start : start + batch_size] = indices.flatten(1, 2).numpy()
        write_atomic(path, lambda file: np.save(file, tokens))
    return np.load(path, mmap_mode="r")


def commanded_travel(actions: np.ndarray, starts: np.ndarray, lengths: np.ndarray, contact: np.ndarray) -> np.ndarray:
    """Sum of the pose deltas commanded before each frame of its episode, but for those that came to nothing.

    Args:
        actions: (N, 7) rows of a clip cache; row t is sent after frame t.
        starts: (E,) first row of each episode.
        lengths: (E,) rows of each episode.
        contact: (N,) `Contact` of each frame.

    Returns:
        (N, 6) float32, zero at each episode's first frame.
    """
    came_to_nothing = np.append(is_blocked(torch.from_numpy(contact[1:])).numpy(), False)
    deltas = np.where(came_to_nothing[:, None], 0, actions[:, :TRAVEL_DIM].astype(np.float64))
    before = np.concatenate([np.zeros((1, TRAVEL_DIM)), np.cumsum(deltas, axis=0)[:-1]])
    return (before - np.repeat(before[starts], lengths, axis=0)).astype(np.float32)


class DynamicsBatches:
    """Clips of tokens and actions, for `AutoregressiveModel.forward`, every window as likely as any other.

    Windows that show a grasp must not be drawn more often than those that show a miss, or a model that cannot tell the
    two apart imagines grasps.
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
        """
        lengths = np.concatenate([cache.lengths for cache in caches])
        self.sampler = ClipSampler(lengths, clip_length=clip_length + 1, batch_size=batch_size, seed=seed)
        self.starts = np.cumsum(lengths) - lengths
        self.tokens = np.concatenate(list(tokens))
        self.seen = np.concatenate([t if i is None else i for t, i in zip(tokens, imagined, strict=True)])
        self.imagined = np.concatenate([np.full(len(t), i is not None) for t, i in zip(tokens, imagined, strict=True)])
        self.watched = np.concatenate(list(watched))
        self.contact = np.concatenate(list(contact)).astype(np.int64)
        self.actions = np.concatenate([cache.columns["actions"] for cache in caches])
        self.travel = commanded_travel(self.actions, self.starts, lengths, self.contact)
        self.seed = seed

    def __call__(self, step: int) -> Batch:
        """Return the batch that `AutoregressiveModel.forward` describes.

        A clip's anchor is the first frame of its episode, or the frame just before the clip, as when a rollout starts
        in the middle; an imagined clip's anchor is always the first frame, where its rollout began.
        """
        first = self.sampler.batch(step)
        from_here = np.random.default_rng([self.seed, step, 1]).random(len(first)) < FROM_HERE_FRACTION
        from_here &= ~self.imagined[first]
        anchor = np.where(from_here, first, self.starts[np.searchsorted(self.starts, first, side="right") - 1])
        rows = np.concatenate([anchor[:, None], first[:, None] + np.arange(1, self.sampler.clip_length - 1)], axis=1)
        previous = self.actions[np.maximum(rows - 1, 0)]
        previous[:, 0] = 0
        previous[:, 0, -1] = self.actions[anchor, -1]
        return {
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


class VideoBatches:
    """Clips, and every `image_every`-th time single frames of them, for `ReconstructionObjective.forward`."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        clip_length: int,
        batch_size: int,
        seed: int,
        image_every: int = 2,
        image_stride: int = 1,
        crop: int = 0,
    ) -> None:
        """Find the windows.

        Args:
            mixture: where the clips come from; an augmented one is treated as a whole.
            clip_length: frames of a clip.
            batch_size: clips of a batch.
            seed: of the sequence of batches.
            image_every: every so many batches one of images, the first one among them; 0 for none.
            image_stride: an image is one frame in so many of a clip; at a tokenizer's factor of time a batch of
                images has as many latents as one of clips.
            crop: side in pixels of the square, at a random place, that is shown of each clip; 0 for all of it.

        Raises:
            ValueError: no episode of a cache is long enough; names the cache. Or a crop is larger than the frames.
        """
        for cache in mixture.caches:
            if cache.lengths.max() < clip_length:
                raise ValueError(
                    f"{cache.directory}: clip_length must be at most {cache.lengths.max()}, its longest episode, got "
                    f"{clip_length}"
                )
        self.mixture, self.clip_length, self.batch_size, self.seed = mixture, clip_length, batch_size, seed
        height, width = mixture.caches[0].frames.shape[1:3]
        if not 0 <= crop <= min(height, width):
            raise ValueError(f"crop must lie in [0, {min(height, width)}], frames being {(height, width)}, got {crop}")
        self.crop = (crop, crop) if crop else (height, width)
        self.image_every, self.image_stride = image_every, image_stride
        self.windows = [first_rows_of_clips(cache.lengths, clip_length) for cache in mixture.caches]

    def __call__(self, step: int) -> Batch:
        """Return `frames` (B, T, H, W, 3) uint8; T is 1 in a batch of images, of more rows."""
        rng = np.random.default_rng([self.seed, step])
        # The first of each round: what is logged every so many steps, a multiple of the round, is then of videos.
        images = self.image_every > 0 and step % self.image_every == 0
        clips = []
        for k in self.mixture.draw(rng, self.batch_size):
            first = rng.choice(self.windows[k])
            clip = self.mixture.caches[k].frames[first : first + self.clip_length]
            clip = augmented(clip, rng) if self.mixture.is_augmented[k] else clip
            top, left = (rng.integers(side - shown + 1) for side, shown in zip(clip.shape[1:3], self.crop, strict=True))
            clips.append(clip[:, top : top + self.crop[0], left : left + self.crop[1]])
        frames = np.stack(clips)
        if images:
            frames = frames[:, :: self.image_stride].reshape(-1, 1, *frames.shape[2:])
        return {"frames": torch.from_numpy(frames)}


def augmented(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop, mirror, brighten and stretch the contrast of a clip (T, H, W, 3) uint8, all frames alike."""
    height, width = clip.shape[1:3]
    side = rng.uniform(SMALLEST_CROP, 1)
    crop_height, crop_width = round(side * height), round(side * width)
    top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
    clip = clip[:, top : top + crop_height, left : left + crop_width]
    if rng.random() < 0.5:
        clip = clip[:, :, ::-1]
    gain, offset = rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    images = torch.from_numpy(clip.astype(np.float32)).permute(0, 3, 1, 2)
    resized = F.interpolate(images, (height, width), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
    return np.clip((resized - 128) * gain + 128 + offset, 0, 255).round().astype(np.uint8)


class TokenClipBatches:
    """Clips of consecutive frames' tokens and actions, for `Transformer.forward`, every window as likely as any other.

    Every `image_every`-th batch holds single frames instead, as many as there are in a batch of clips.
    """

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

        Raises:
            ValueError: an instruction is too long for the encoder.
        """
        lengths = np.concatenate([cache.lengths for cache in caches])
        self.sampler = ClipSampler(lengths, clip_length=clip_length, batch_size=batch_size, seed=seed)
        self.starts = np.cumsum(lengths) - lengths
        self.tokens = np.concatenate(list(tokens))
        self.actions = np.concatenate([cache.columns["actions"] for cache in caches])
        self.seed, self.image_every = seed, image_every
        self.text: torch.Tensor | None = None
        if text_encoder is not None:
            instructions = [episode["instruction"] for cache in caches for episode in cache.episodes]
            distinct, which = np.unique(instructions, return_inverse=True)
            self.text, self.instruction = text_encoder(distinct.tolist()), which

    def __call__(self, step: int) -> Batch:
        """Return the batch that `Transformer.forward` describes."""
        rng = np.random.default_rng([self.seed, step, 1])
        length, first = self.sampler.clip_length, self.sampler.batch(step)
        if self.image_every > 0 and step % self.image_every == 0:
            length, first = 1, rng.integers(len(self.tokens), size=length * len(first))
        rows = first[:, None] + np.arange(length)
        batch = {
            "tokens": torch.from_numpy(self.tokens[rows]),
            "action": torch.from_numpy(self.actions[rows]),
            "seed": torch.tensor(self.seed * 1_000_003 + step),
        }
        if self.text is not None:
            told = torch.from_numpy(rng.random(len(first)) >= UNTOLD_FRACTION)
            episode = np.searchsorted(self.starts, first, side="right") - 1
            batch["text"] = self.text[self.instruction[episode]] * told[:, None, None]
        return batch
