"""How fast the clip cache delivers training clips of 16 frames at 128x128 once it lies in the page cache.

    python benchmarks/clip_cache.py [--quick]

Three figures, because "delivered" has more than one honest meaning: `views_per_s` hands out slices of the memory map
(no pixel is moved until somebody reads it), `views_read_per_s` also reads every pixel of them once (a sum), and
`copied_per_s` copies them into batches of 32, as a training loop does that passes them on to torch. Beside them,
`decoded_per_s`: the same clips decoded from the lossless video instead. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.data.sampler import ClipSampler
from wfm_core.data.video import decode_video, encode_video

CLIP_LENGTH, BATCH_SIZE, SIZE, EPISODE_FRAMES = 16, 32, 128, 61


def make_episode(index: int) -> Episode:
    """A bright square that wanders over a still, textured table: as compressible as a rendered episode."""
    rng = np.random.default_rng(index)
    table = np.kron(rng.integers(90, 170, (32, 32, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    frames = np.repeat(table[None], EPISODE_FRAMES, axis=0)
    path = np.clip(50 + np.cumsum(rng.integers(-4, 5, (EPISODE_FRAMES, 2)), axis=0), 0, SIZE - 24)
    for frame, (y, x) in zip(frames, path, strict=True):
        frame[y : y + 24, x : x + 24] = 30
    return Episode(
        frames=frames,
        actions=rng.normal(size=(EPISODE_FRAMES - 1, 7)).astype(np.float32),
        agent_pos=rng.normal(size=(EPISODE_FRAMES, 7)).astype(np.float32),
        labels={"success": np.zeros(EPISODE_FRAMES, dtype=bool)},
        instruction="wander",
        episode_id=str(index),
        convention="commanded",
        command_lag=0,
    )


def rate(work: Callable[[int], int], seconds: float) -> float:
    """Call `work` with 0, 1, 2, ... for `seconds` and return clips per second; work returns how many it delivered."""
    clips, calls, start = 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        clips += work(calls)
        calls += 1
    return clips / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small cache and short runs (some 20 seconds)")
    quick = parser.parse_args().quick
    num_episodes, seconds = (60, 2.0) if quick else (400, 8.0)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = build_clip_cache(map(make_episode, range(num_episodes)), Path(folder) / "cache")
        build_s = time.perf_counter() - start
        megabytes = cache.frames.nbytes / 1e6
        print(
            f"cache of {num_episodes} episodes, {len(cache.frames)} frames, {megabytes:.0f} MB, made in {build_s:.1f} s"
        )
        cache.frames.sum()  # read it once: now it lies in the page cache

        sampler = ClipSampler(cache.lengths, clip_length=CLIP_LENGTH, batch_size=BATCH_SIZE, seed=0)
        rows = np.concatenate([sampler.batch(k) for k in range(200)])
        episodes = np.searchsorted(cache.starts, rows, side="right") - 1
        places = list(zip(episodes.tolist(), (rows - cache.starts[episodes]).tolist(), strict=True))

        def view(k: int) -> int:
            cache.clip(*places[k % len(places)], CLIP_LENGTH)
            return 1

        def read(k: int) -> int:
            cache.clip(*places[k % len(places)], CLIP_LENGTH)["frames"].reshape(-1).view(np.uint64).sum()
            return 1

        def copy(k: int) -> int:
            cache.batch(sampler.batch(k), CLIP_LENGTH)
            return BATCH_SIZE

        video = Path(folder) / "episode.mp4"
        video.write_bytes(encode_video(make_episode(0).frames, fps=5))

        def decode(k: int) -> int:
            decode_video(video, (k * 7 % (EPISODE_FRAMES - CLIP_LENGTH)) / 5, CLIP_LENGTH)
            return 1

        figures = {
            "views_per_s": rate(view, seconds),
            "views_read_per_s": rate(read, seconds),
            "copied_per_s": rate(copy, seconds),
            "decoded_per_s": rate(decode, seconds),
        }
    for name, value in figures.items():
        print(f"{name:>18} {value:12,.0f}  clips of {CLIP_LENGTH} frames, {SIZE}x{SIZE}")
    settings = {"clip_length": CLIP_LENGTH, "image_size": SIZE, "batch_size": BATCH_SIZE, "cache_mb": round(megabytes)}
    print(json.dumps({name: round(value) for name, value in figures.items()} | settings | {"quick": quick}))


if __name__ == "__main__":
    main()
