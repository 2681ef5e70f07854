"""What a tokenizer makes of the frames of clip caches: kept beside them, or passed on, and what it is like."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from tqdm import trange

from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.tokenizers.batches import check_size
from wfm_core.tokenizers.patch import PatchTokenizer, to_float


def encode_cache(tokenizer: PatchTokenizer, cache: ClipCache, batch_size: int = 256) -> np.ndarray:
    """Encode every frame of a cache once and keep this beside it, under a name that hashes the encoder's weights.

    Args:
        tokenizer: float32, in evaluation mode.
        cache: where the frames are.
        batch_size: frames encoded at once.

    Returns:
        A memory map: (N, n, C) uint8 level indices, or (N, h, w, C) float16 latents of a continuous tokenizer, the
        cells camera by camera.

    Raises:
        ValueError: the frames have another size than the tokenizer's.
    """
    digest = hashlib.sha256()
    for value in tokenizer.encoder.state_dict().values():
        digest.update(value.numpy().tobytes())
    kind = "tokens" if tokenizer.config.levels else "latents"
    path = cache.directory / f"{kind}.{digest.hexdigest()[:16]}.npy"

    def write(file: BinaryIO) -> None:
        for k, part in enumerate(encode_frames(tokenizer, cache, batch_size)):
            if k == 0:
                descr, shape = npy.dtype_to_descr(part.dtype), (len(cache.frames), *part.shape[1:])
                npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            file.write(part.tobytes())

    if not path.exists():
        write_atomic(path, write)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def encode_frames(tokenizer: PatchTokenizer, cache: ClipCache, batch_size: int = 256) -> Iterator[np.ndarray]:
    """Encode every frame of a cache, `batch_size` at once, and keep nothing; see `encode_cache`."""
    check_size(cache, tokenizer.config.image_size, stacked=True)
    for start in trange(0, len(cache.frames), batch_size, desc=f"encoding {cache.directory}"):
        frames = torch.from_numpy(np.array(cache.frames[start : start + batch_size]))
        yield tokenizer.codec.pack(tokenizer.encode(to_float(frames)))


def latent_statistics(latents: Sequence[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each dimension of latents, per cache (N, h, w, C), over all frames and cells.

    A dimension that hardly varies is given a standard deviation of 0.01, or its noise would be made to look like data.
    """
    count = sum(each[..., 0].size for each in latents)
    # In float64 and in parts: a memory map of float16 neither adds up nor fits.
    parts = [part for each in latents for part in np.array_split(each, 1 + len(each) // 4096)]
    mean = sum(part.sum(axis=(0, 1, 2), dtype=np.float64) for part in parts) / count
    variance = sum(((part - mean) ** 2).sum(axis=(0, 1, 2)) for part in parts) / count
    return tuple(mean.tolist()), tuple(np.sqrt(variance).clip(min=0.01).tolist())
