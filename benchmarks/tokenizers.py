"""How well do tokenizers reconstruct, and how fast? The same held-out video for all of them.

    python benchmarks/tokenizers.py [--quick] [--checkpoints NAME_OR_FOLDER ...] [--data FOLDER ...]

The twin's episodes are those of benchmarks/fidelity.py; --data adds others, for instance a folder of real clips.
Frames are made squares of --size pixels first, and a video whose length does not fit is continued by its last frame.
All is computed in float32 but for the speed, which is measured in bfloat16 where the hardware has it; only an encoder
that rounds to levels stays in float32. The Frechet distance is between features of single frames, averaged over
positions, of the network that the figures name: it is neither FID nor FVD. `perceptual`, `gram` and `flow` are the
losses that video tokenizers are trained on, of the first 17 frames of each episode, seen through that network and
through --flow-network. Tokenizers of kind patch decode with the help of the episode's first frame, the others with
none. A checkpoint with a diffusion decoder has a second row, of that. `psnr_continuous` and `psnr_discrete` are the
best of their sort on the twin. The last line is one JSON object.
"""

import argparse
import copy
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.fidelity import held_out_cache
from benchmarks.step_speed import count_flops, matmul_peak, seconds
from tasks import TASKS
from wfm_core.checkpoint import (
    SHIPPED_DIR,
    Tokenizer,
    compute_dtype,
    find_checkpoint,
    load_diffusion_decoder,
    load_tokenizer,
    read_config,
)
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.video_folder import square_frames
from wfm_core.metrics import changed_fraction, flicker, frechet_distance, level_use, psnr, ssim
from wfm_core.models.diffusion_decoder import DiffusionDecoder
from wfm_core.tokenizers.batches import median_backgrounds
from wfm_core.tokenizers.flow import LUCAS_KANADE, flow_loss, load_flow_network
from wfm_core.tokenizers.fsq import FSQ
from wfm_core.tokenizers.losses import foreground_mask
from wfm_core.tokenizers.patch import PatchTokenizer, to_float, to_uint8
from wfm_core.tokenizers.perceptual import GABOR, frame_features, gram_loss, load_feature_network, perceptual_loss
from wfm_core.tokenizers.video import VideoTokenizer
from worldsim.caches import open_caches

Drawer = Tokenizer | DiffusionDecoder  # what turns latents to pixels

TWIN = "twin"
CLIP_FRAMES = 17  # what is timed and what losses see: fits every time factor
COLUMNS = (
    "psnr",
    "foreground_psnr",
    "ssim",
    "flicker",
    "frechet",
    "perceptual",
    "gram",
    "flow",
    "level_use",
    "latent_mean",
    "latent_std",
    "flips",
    "encode_fps",
    "encode_fraction_of_peak",
    "decode_fps",
    "decode_fraction_of_peak",
)


@dataclass
class Videos:
    """A data set: frames of each episode (T, H, W, 3) uint8, and its background (H, W, 3) uint8 where one is known."""

    name: str
    episodes: list[np.ndarray]
    backgrounds: list[np.ndarray] | None


def load_videos(name: str, cache: ClipCache, size: int) -> Videos:
    """Take a cache's episodes as squares; the twin's camera stands still, so its background is a median."""
    windows = zip(cache.starts, cache.lengths, strict=True)
    episodes = [np.array(square_frames(cache.frames[start : start + length], size)) for start, length in windows]
    if any(episode["meta"].get("task_name") not in TASKS for episode in cache.episodes):
        return Videos(name, episodes, None)
    backgrounds, group = median_backgrounds(cache, min(301, int(cache.lengths.min()) * 20))
    return Videos(name, episodes, list(square_frames(backgrounds, size)[group]))


def encode(tokenizer: Tokenizer, video: Tensor) -> Tensor:
    """Encode a video (T, 3, H, W), continued by its last frame to a length that fits, to latents (t, h, w, C)."""
    if isinstance(tokenizer, PatchTokenizer):
        return tokenizer.encode(video)
    missing = (1 - len(video)) % tokenizer.config.time_factor
    return tokenizer.encode(torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])[None])[0][0]


def decode(tokenizer: Tokenizer, drawer: Drawer, latents: Tensor, first: Tensor) -> Tensor:
    """Decode latents (t, h, w, C) to a video (T, 3, H, W); `first` (1, 3, H, W) is the reference of who needs one."""
    if isinstance(drawer, VideoTokenizer):
        return drawer.decode(latents[None])[0][0]
    assert isinstance(tokenizer, PatchTokenizer)
    latents = latents.to(tokenizer.position.dtype)
    reference = first.expand(len(latents), -1, -1, -1)
    return drawer.decode(latents, reference, latents[:1].expand_as(latents))


def reconstruct(
    tokenizer: Tokenizer, drawer: Drawer, videos: Videos, device: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return each episode decoded, (T, H, W, 3) uint8, and its latents, (t, h, w, C)."""
    decoded, latents = [], []
    for frames in tqdm(videos.episodes, desc=videos.name):
        video = to_float(torch.from_numpy(frames)).to(device)
        latents.append(encode(tokenizer, video))
        decoded.append(to_uint8(decode(tokenizer, drawer, latents[-1], video[:1])[: len(frames)]).cpu().numpy())
    return decoded, [each.float().cpu().numpy() for each in latents]


def frame_figures(decoded: list[np.ndarray], videos: Videos, network: nn.Module) -> dict[str, float]:
    """Compare decoded episodes with the true ones: means over all frames, in dB, or of 255 for flicker."""
    pairs = list(zip(decoded, videos.episodes, strict=True))
    steps = np.array([len(true) - 1 for true in videos.episodes])
    moving = [(flicker(ours, true) if len(true) > 1 else 0.0) for ours, true in pairs]
    figures = {
        "psnr": np.concatenate([psnr(ours, true) for ours, true in pairs]).mean(),
        "ssim": np.concatenate([ssim(ours, true) for ours, true in pairs]).mean(),
        "flicker": np.average(moving, weights=steps) if steps.any() else math.nan,
        "frechet": frechet_distance(
            *(np.concatenate([frame_features(network, each) for each in side]) for side in (decoded, videos.episodes))
        ),
    }
    if videos.backgrounds is not None:
        masked = []
        for (ours, true), background in zip(pairs, videos.backgrounds, strict=True):
            mask = foreground_mask(torch.from_numpy(true), torch.from_numpy(background))[:, 0].numpy()
            masked.append(psnr(ours, true, mask))
        figures["foreground_psnr"] = np.nanmean(np.concatenate(masked))
    return {name: float(value) for name, value in figures.items()}


def loss_figures(decoded: list[np.ndarray], videos: Videos, features: nn.Module, flow: nn.Module) -> dict[str, float]:
    """What the losses of video tokenizers say of the beginning of each episode: means over the episodes."""
    found: dict[str, list[float]] = {"perceptual": [], "gram": [], "flow": []}
    for pair in zip(decoded, videos.episodes, strict=True):
        ours, true = (to_float(torch.from_numpy(frames[:CLIP_FRAMES])) for frames in pair)
        seen, aim = features(ours), features(true)
        found["perceptual"].append(float(perceptual_loss(seen, aim)))
        found["gram"].append(float(gram_loss(seen, aim)))
        if len(true) > 1:
            found["flow"].append(float(flow_loss(flow, ours[None], true[None])))
    return {name: float(np.mean(values)) if values else math.nan for name, values in found.items()}


def latent_figures(tokenizer: Tokenizer, latents: list[np.ndarray], videos: Videos) -> dict[str, float]:
    """Say how latents (t, h, w, C) spread, or how evenly levels are used; and which change where no pixel does."""
    if not tokenizer.config.levels:
        values = np.concatenate([each.ravel() for each in latents]).astype(np.float64)
        return {"latent_mean": float(values.mean()), "latent_std": float(values.std())}
    fsq = FSQ(tokenizer.config.levels)
    tokens = [fsq.to_indices(torch.from_numpy(each)).flatten(1, 2).numpy() for each in latents]
    figures = {"level_use": level_use(np.concatenate(tokens), fsq.levels)}
    if isinstance(tokenizer, PatchTokenizer) or not tokenizer.config.is_video:
        side = videos.episodes[0].shape[1] // latents[0].shape[1]
        figures["flips"] = changed_fraction(np.concatenate(tokens), np.concatenate(videos.episodes), side)
    return figures


def speed_figures(tokenizer: Tokenizer, drawer: Drawer, clip: Tensor, budget: float) -> tuple[dict[str, float], float]:
    """Time the coding of a clip (T, 3, H, W): frames a second, fractions of the peak; and the peak, FLOP/s."""
    device, dtype = clip.device.type, compute_dtype(clip.device)
    fast, draws = copy.deepcopy((tokenizer, drawer))
    for part in (fast, draws):
        part.to(device=clip.device, dtype=dtype)
    if fast.config.levels:  # rounding to levels magnifies rounding errors
        fast.encoder.float()
    latents = encode(fast, clip)
    figures, peaks = {}, [matmul_peak(dtype, budget, device)]
    work = {"encode": lambda: encode(fast, clip), "decode": lambda: decode(fast, draws, latents, clip[:1])}
    for name, run in work.items():  # between two peaks: a machine that slows down slows both
        taken = seconds(run, budget, device)
        peaks.append(matmul_peak(dtype, budget, device))
        figures[f"{name}_fps"] = len(clip) / taken
        figures[f"{name}_fraction_of_peak"] = count_flops(run) / taken / max(peaks[-2:])
    return figures, max(peaks)


def shipped_tokenizers() -> list[str]:
    """Names of the shipped checkpoints that have a tokenizer."""
    folders = sorted(path.parent for path in SHIPPED_DIR.glob("*/config.json"))
    return [folder.name for folder in folders if "tokenizer" in read_config(folder)]


def best(rows: list[dict], letter: str) -> float | None:
    """Highest PSNR on the twin of the tokenizers whose kind begins with a letter."""
    return max((row["psnr"] for row in rows if row["kind"].startswith(letter) and row["data"] == TWIN), default=None)


@torch.no_grad()
def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 twin episodes instead of 100, shorter timing")
    parser.add_argument("--checkpoints", nargs="+", help="names or folders; default: all shipped ones")
    parser.add_argument("--data", nargs="*", default=[], type=Path, help="further data sets of any known format")
    parser.add_argument("--size", type=int, default=128, help="height and width of the frames, px")
    parser.add_argument("--feature-network", default=GABOR, help="of the Frechet distance: a name or a file")
    parser.add_argument("--flow-network", default=LUCAS_KANADE, help="of the loss of flow: a name or a file")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("outputs/fidelity"), help="where the twin's episodes are kept")
    arguments = parser.parse_args()
    num_episodes, budget = (12, 1.0) if arguments.quick else (100, 3.0)
    network, flow = load_feature_network(arguments.feature_network), load_flow_network(arguments.flow_network)
    caches = {TWIN: held_out_cache(arguments.out, num_episodes)}
    caches |= {str(folder): open_caches([str(folder)])[0] for folder in arguments.data}
    data = [load_videos(name, cache, arguments.size) for name, cache in caches.items()]
    clip = to_float(torch.from_numpy(data[0].episodes[0][:CLIP_FRAMES])).to(arguments.device)
    rows, peaks = [], []
    for name in arguments.checkpoints or shipped_tokenizers():
        tokenizer = load_tokenizer(name).to(arguments.device)
        if isinstance(tokenizer, PatchTokenizer) and tokenizer.config.image_size != arguments.size:
            parser.error(f"{name} takes frames of {tokenizer.config.image_size} pixels, got --size {arguments.size}")
        drawers: dict[str, Drawer] = {name: tokenizer}
        if "decoder" in read_config(find_checkpoint(name)):
            drawers[f"{name}, diffusion decoder"] = load_diffusion_decoder(find_checkpoint(name)).to(arguments.device)
        for (row_name, drawer), videos in itertools.product(drawers.items(), data):
            if videos is data[0]:
                speed, peak = speed_figures(tokenizer, drawer, clip, budget)
                peaks.append(peak)
            decoded, latents = reconstruct(tokenizer, drawer, videos, arguments.device)
            found = frame_figures(decoded, videos, network) | loss_figures(decoded, videos, network, flow)
            found |= latent_figures(tokenizer, latents, videos) | speed
            row = {"name": row_name, "kind": tokenizer.config.name, "data": videos.name}
            rows.append(row | {column: rounded(found.get(column, math.nan)) for column in COLUMNS})
    for row in rows:
        print(f"{row['name']} ({row['kind']}) on {row['data']}")
        print("  " + ", ".join(f"{column} {row[column]}" for column in COLUMNS if row[column] is not None))
    figures = {
        "psnr_continuous": best(rows, "C"),
        "psnr_discrete": best(rows, "D"),
        "rows": rows,
        "feature_network": arguments.feature_network,
        "flow_network": arguments.flow_network,
        "twin_episodes": num_episodes,
        "size": arguments.size,
        "peak_gflops": round(max(peaks) / 1e9, 1),
        "dtype_of_speed": str(compute_dtype(torch.device(arguments.device))).removeprefix("torch."),
        "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": arguments.quick,
    }
    print(json.dumps(figures, allow_nan=False))


def rounded(value: float) -> float | None:
    """Five digits, because Frechet distances are small; None for what is not known."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


if __name__ == "__main__":
    main()
