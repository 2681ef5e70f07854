"""Batches that tokenizers are trained on, as pure functions of the step number, drawn from clip caches."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.sampler import first_rows_of_clips
from wfm_core.train import Batch

FROM_HERE_FRACTION = 0.3
"""Fraction of samples whose rollout begins in the middle of the episode: what stands for its first frame is later."""
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

    def __init__(
        self, mixture: Mixture, batch_size: int, seed: int, *, num_cameras: int = 1, still: bool = True
    ) -> None:
        """Look at the scenes.

        Args:
            mixture: where the frames come from.
            batch_size: frames of a batch.
            seed: of the sequence of batches.
            num_cameras: whose frames stand on top of each other; a sample is of one of them.
            still: the cameras stand still and many episodes share a scene, so that its median is the background; if
                not, the reference is.
        """
        self.mixture, self.batch_size, self.seed, self.num_cameras = mixture, batch_size, seed, num_cameras
        self.backgrounds = [median_backgrounds(cache) for cache in mixture.caches] if still else None

    def __call__(self, step: int) -> Batch:
        """Return `frames`, `reference` and `background`, each (B, H, W, 3) uint8, and `seed`.

        The reference is the first frame of the frame's episode, or one between the two.
        """
        rng = np.random.default_rng([self.seed, step])
        picks = self.mixture.draw(rng, self.batch_size)
        since = np.where(rng.random(self.batch_size) < FROM_HERE_FRACTION, rng.random(self.batch_size), 0)
        triples = []
        for k in np.unique(picks):
            cache = self.mixture.caches[k]
            rows = np.sort(rng.integers(len(cache.frames), size=(picks == k).sum()))
            episodes = np.searchsorted(cache.starts, rows, side="right") - 1
            first = cache.starts[episodes]
            reference = cache.frames[first + (since[picks == k] * (rows - first)).astype(np.int64)]
            background = reference
            if self.backgrounds is not None:
                medians, scene = self.backgrounds[k]
                background = medians[scene[episodes]]
            drawn = np.stack([cache.frames[rows], reference, background], axis=1)
            if self.num_cameras > 1:
                views = rearrange(drawn, "n k (v h) w c -> n v k h w c", v=self.num_cameras)
                drawn = views[np.arange(len(rows)), rng.integers(self.num_cameras, size=len(rows))]
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


def check_size(cache: ClipCache, image_size: int, *, stacked: bool = False) -> None:
    """Check that frames have the size that a tokenizer takes; `stacked` ones are of several cameras.

    Raises:
        ValueError: they do not; names the cache.
    """
    found = cache.frames.shape[1:3]
    cameras = max(1, found[0] // image_size) if stacked else 1
    if found != (cameras * image_size, image_size):
        raise ValueError(f"{cache.directory}: frames must be {image_size} x {image_size}, got {found[0]} x {found[1]}")
