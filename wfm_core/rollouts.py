"""Recorded episodes once more, as a world model imagines them from their first frame under their actions."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

from wfm_core.checkpoint import load_patch_tokenizer, load_world_model, read_part
from wfm_core.data.camera_rays import rays_ahead
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.models.latent_world_model import LatentWorldModel
from wfm_core.models.revealing import AutoregressiveModel
from wfm_core.models.token_world_model import TokenWorldModel
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.world_model import Reference, WorldModel


@torch.no_grad()
def imagine_episodes(
    model: WorldModel,
    codec: LatentCodec,
    cache: ClipCache,
    real: np.ndarray,
    episodes: np.ndarray,
    actions: np.ndarray | None = None,
    contact: np.ndarray | None = None,
    chunk: int = 1,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Roll episodes out from their first frame.

    Args:
        model: the world model.
        codec: how its tokenizer's latents are kept.
        cache: where the actions are.
        real: (N, ...) of all frames of the cache, as kept (see `wfm_core.encoding.encode_cache`).
        episodes: indices of the episodes to roll out, all in one batch; each is its rollout's seed.
        actions: (N, 7) physical actions aligned with the cache's rows; None takes the recorded ones.
        contact: (N,) `Contact` of each frame, so that what was grasped is grasped, and what was missed is missed; None
            leaves it to the model, as does a model that knows nothing of contact.
        chunk: frames that are imagined at once, by a `LatentWorldModel`.

    Returns:
        The episodes' frames, (sum of lengths, ...) as kept, the first ones real and the others imagined, and the
        uncertainties of each episode's steps.

    Raises:
        ValueError: the model takes one action at a time, or not so many.
    """
    if chunk > 1 and not isinstance(model, LatentWorldModel):
        raise ValueError(f"chunk={chunk} needs a world model of latents, got {type(model).__name__}")
    actions = cache.columns["actions"] if actions is None else actions
    starts, lengths = cache.starts[episodes], cache.lengths[episodes]
    first = codec.unpack(real[starts])
    texts = [cache.episodes[episode]["instruction"] for episode in episodes]
    state = model.start(first[:, None], torch.zeros(len(episodes), 0, actions.shape[1]), episodes.tolist(), texts)
    dynamics = model.dynamics if isinstance(model, TokenWorldModel) else None
    told_rays = isinstance(dynamics, AutoregressiveModel) and dynamics.config.rays
    rolled = [real[start : start + length].copy() for start, length in zip(starts, lengths, strict=True)]
    uncertainties = np.zeros((lengths.max() - 1, len(episodes)))
    for t in range(1, lengths.max(), chunk):
        ahead = np.arange(t, min(t + chunk, lengths.max()))
        rows = np.minimum((starts - 1)[:, None] + ahead, (starts + lengths - 2)[:, None])  # who has ended repeats its
        given = torch.from_numpy(actions[rows])  # last step, unseen
        if isinstance(model, LatentWorldModel):
            state, latents, uncertainty = model.step_chunk(state, given)
        else:
            if told_rays:
                rays = rays_ahead(cache.columns, rows[:, 0], starts, model.latent_shape[:2])
                state = state | {"rays": torch.from_numpy(rays)}
            if contact is not None and "next_contact" in state:  # not every family knows of contact
                state = state | {"next_contact": torch.from_numpy(contact[rows[:, 0] + 1].astype(np.int64))}
            state, *one = model.step(state, given[:, 0])
            latents, uncertainty = (value[:, None] for value in one)
        kept = codec.pack(latents)
        uncertainties[ahead - 1] = uncertainty.float().numpy().T
        for k, j in np.argwhere(ahead < lengths[:, None]):
            rolled[k][ahead[j]] = kept[k, j]
    return np.concatenate(rolled), [uncertainties[: length - 1, k] for k, length in enumerate(lengths)]


def imagine_cache(
    model: WorldModel,
    codec: LatentCodec,
    cache: ClipCache,
    real: np.ndarray,
    batch_size: int = 64,
    actions: np.ndarray | None = None,
    contact: np.ndarray | None = None,
    chunk: int = 1,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """As `imagine_episodes`, all episodes of a cache, `batch_size` at once."""
    rolled, uncertainties = [], []
    for first in trange(0, len(cache), batch_size, desc=f"imagining {cache.directory}"):
        episodes = np.arange(first, min(first + batch_size, len(cache)))
        part, doubts = imagine_episodes(model, codec, cache, real, episodes, actions, contact, chunk)
        rolled.append(part)
        uncertainties += doubts
    return np.concatenate(rolled), uncertainties


def first_rows(cache: ClipCache) -> np.ndarray:
    """Row of each frame's episode start, (N,)."""
    return np.repeat(cache.starts, cache.lengths)


def swapped_actions(cache: ClipCache, rng: np.random.Generator) -> np.ndarray:
    """Give each episode another's actions, if possible of its instruction, repeated to its length: (N, 7)."""
    actions = cache.columns["actions"]
    names = np.array([episode["instruction"] for episode in cache.episodes])
    swapped = np.empty_like(actions)
    for k, (start, length) in enumerate(zip(cache.starts, cache.lengths, strict=True)):
        others = np.setdiff1d(np.flatnonzero(names == names[k]), [k])
        others = others if len(others) else np.setdiff1d(np.arange(len(names)), [k])
        donor = rng.choice(others) if len(others) else k
        rows = cache.starts[donor] + np.arange(length) % (cache.lengths[donor] - 1)
        swapped[start : start + length] = actions[rows]
    return swapped


def decode_cache(
    model: WorldModel, codec: LatentCodec, cache: ClipCache, real: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Decode what is kept of a whole cache; each episode's first frame is the reference.

    Args:
        model: the world model.
        codec: how its tokenizer's latents are kept.
        cache: where the frames are.
        real: (N, ...) real frames of the cache, as kept.
        kept: (N, ...), real or imagined.

    Returns:
        (N, H, W, 3) uint8.
    """
    first = first_rows(cache)
    decoded = []
    for rows in tqdm(np.array_split(np.arange(len(kept)), max(1, len(kept) // 64)), desc="decoding"):
        reference = Reference(torch.from_numpy(cache.frames[first[rows]]), codec.unpack(real[first[rows]]))
        decoded.append(model.decode(codec.unpack(kept[rows]), reference).numpy())
    return np.concatenate(decoded)


def imagined_frames(
    model: WorldModel,
    codec: LatentCodec,
    cache: ClipCache,
    real: np.ndarray,
    actions: np.ndarray | None = None,
    chunk: int = 1,
) -> np.ndarray:
    """Imagine all episodes of a cache from their first frames, as `imagine_episodes` does: (N, H, W, 3) uint8."""
    kept, _ = imagine_cache(model, codec, cache, real, actions=actions, chunk=chunk)
    return decode_cache(model, codec, cache, real, kept)


def keep_imagined(checkpoint: Path, cache: ClipCache, real: np.ndarray, contact: np.ndarray) -> np.ndarray:
    """Imagine every episode of a cache once and keep the frames beside it, under a name that hashes what made them.

    Args:
        checkpoint: folder with tokenizer and dynamics.
        cache: where the actions are.
        real: (N, ...) real frames of the cache, as kept (see `wfm_core.encoding.encode_cache`).
        contact: (N,) `Contact` of each frame: imagined episodes turn out as the recorded ones did.

    Returns:
        Of the same shape, each episode's first frame real and the others imagined; a memory map.
    """
    made_by = [
        np.ascontiguousarray(real[cache.starts]).tobytes(),
        contact.tobytes(),
        json.dumps(read_part(checkpoint, "dynamics"), sort_keys=True).encode(),
        (checkpoint / "dynamics.safetensors").read_bytes(),
    ]
    path = cache.directory / f"imagined.{hashlib.sha256(b''.join(made_by)).hexdigest()[:16]}.npy"
    if not path.exists():
        codec = load_patch_tokenizer(checkpoint).codec
        imagined, _ = imagine_cache(load_world_model(checkpoint), codec, cache, real, contact=contact)
        write_atomic(path, lambda file: np.save(file, imagined))
    return np.load(path, mmap_mode="r")
