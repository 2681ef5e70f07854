"""The Bridge table: world models side by side on held-out episodes, each imagined from its first frame only.

    python benchmarks/bridge_table.py [--quick] [--world-models NAME ...] [--baseline NAME] [--data FOLDER]

The episodes are the twin's 100 published ones (see benchmarks/fidelity.py), or, with --data, those of any data set that
has actions: LeRobot, RLDS, or JSON and mp4, frames brought to the models' size. Every row is over the same frames, all
but each episode's first:

    psnr_db, ssim    means over frames; higher is better
    latent_l2        root mean square difference of the latents that one tokenizer, bridge-nano-diffusion, gives to both
    fvd              Frechet distance between clips of 16 frames, each described by the mean and the mean change of
                     every feature of the network that is named; not the published FVD, whose network is a download
    swapped_db       what it costs in PSNR to be given another episode's actions: how far actions are heeded
    frames_per_s     at 16 rows, pixels left out

"copy" repeats the first frame. Diffusion models have a row for each of --num-steps, if given, instead of one for their
own number. --baseline names the model that others must beat; `psnr_margin_db` and `fvd_ratio` say by how much `best`
does, the one of them with the highest PSNR (null without one). Nothing else should be computing on the machine
meanwhile. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.decoding import Model, imagine, speed_figures, stepwise
from benchmarks.fidelity import held_out_cache
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import (
    build_config,
    find_checkpoint,
    load_patch_tokenizer,
    load_world_model,
    read_config,
)
from wfm_core.data.clip_cache import ClipCache
from wfm_core.encoding import encode_cache
from wfm_core.memory import keep_freed_memory
from wfm_core.metrics import frechet_distance, psnr, ssim
from wfm_core.models.denoising import DiffusionModel
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.models.latent_world_model import LatentWorldModel
from wfm_core.models.token_world_model import TokenWorldModel
from wfm_core.rollouts import first_rows, swapped_actions
from wfm_core.tokenizers.patch import PatchTokenizer, to_float
from wfm_core.tokenizers.perceptual import GABOR, clip_embedding, frame_features, load_feature_network
from worldsim.caches import open_caches

CLIP_FRAMES, CLIP_STRIDE = 16, 8  # of the clips between whose features the Frechet distance is
LATENT_TOKENIZER = "bridge-nano-diffusion"
COPY = "copy"


def clip_features(network: nn.Module, frames: np.ndarray, cache: ClipCache) -> np.ndarray:
    """Describe clips of all episodes: mean and mean absolute change of each feature, (clips, 2 * D).

    Args:
        network: from `load_feature_network`, D channels in all.
        frames: (N, H, W, 3) uint8 of all rows of the cache.
        cache: says which rows are an episode; one shorter than a clip is a clip of its own.
    """
    features = frame_features(network, frames)
    found = []
    for start, length in zip(cache.starts, cache.lengths, strict=True):
        for first in range(0, max(1, length - CLIP_FRAMES + 1), CLIP_STRIDE):
            found.append(clip_embedding(features[start + first : start + min(first + CLIP_FRAMES, length)]))
    return np.stack(found)


@lru_cache(maxsize=1)
def latent_tokenizer() -> PatchTokenizer:
    """Gives the latents in which distances are measured."""
    return load_patch_tokenizer(LATENT_TOKENIZER, discrete=False)


@torch.no_grad()
def latents_of(frames: np.ndarray) -> np.ndarray:
    """Latents (N, h, w, C) of frames (N, H, W, 3) uint8."""
    tokenizer = latent_tokenizer()
    parts = np.array_split(frames, 1 + len(frames) // 256)
    return np.concatenate([tokenizer.encode(to_float(torch.from_numpy(np.array(part)))).numpy() for part in parts])


def video_figures(frames: np.ndarray, cache: ClipCache, truth: dict[str, Any], network: nn.Module) -> dict[str, float]:
    """Compare frames (N, H, W, 3) of all rows with the true ones, of which `truth` holds latents and clip features."""
    told = np.arange(len(frames)) != first_rows(cache)
    true = np.asarray(cache.frames)[told]
    apart = latents_of(frames[told]) - truth["latents"][told]
    return {
        "psnr_db": float(psnr(frames[told], true).mean()),
        "ssim": float(ssim(frames[told], true).mean()),
        "latent_l2": float(np.sqrt(np.square(apart).mean(axis=(1, 2, 3))).mean()),
        "fvd": frechet_distance(clip_features(network, frames, cache), truth["clips"]),
    }


def model_figures(
    model: Model, cache: ClipCache, real: np.ndarray, truth: dict[str, Any], network: nn.Module, timed_frames: int
) -> dict[str, float]:
    """The row of one world model; `real` are all frames as its tokenizer keeps them."""
    row = video_figures(imagine(model, cache, real), cache, truth, network)
    swapped = imagine(model, cache, real, swapped_actions(cache, np.random.default_rng(0)))
    told = np.arange(len(swapped)) != first_rows(cache)
    row["swapped_db"] = row["psnr_db"] - float(psnr(swapped[told], np.asarray(cache.frames)[told]).mean())
    return row | {"frames_per_s": speed_figures(model, cache, real, timed_frames)["frames_per_s_b16"]}


def variants(model: Model, num_steps: list[int]) -> Iterator[tuple[str, Model]]:
    """The model, or, if it is a diffusion model, as it is with each of these numbers of steps; and what tells them."""
    if not isinstance(model.dynamics, DiffusionModel):
        yield "", model
        return
    own = stepwise(model.dynamics.config)
    for count in num_steps or [own.num_steps]:
        model.dynamics.config = replace(own, num_steps=count)
        yield (f", {count} steps" if num_steps else ""), model


def compared(rows: dict[str, dict[str, float]], baseline: str | None) -> dict[str, float | str | None]:
    """By how much the best of the models, by PSNR, beats the baseline."""
    ours = {name: row for name, row in rows.items() if name not in (COPY, baseline)}
    if baseline is None or not ours:
        return {"best": None, "psnr_margin_db": None, "fvd_ratio": None}
    best = max(ours, key=lambda name: ours[name]["psnr_db"])
    return {
        "best": best,
        "psnr_margin_db": rows[best]["psnr_db"] - rows[baseline]["psnr_db"],
        "fvd_ratio": rows[baseline]["fvd"] / rows[best]["fvd"],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 of the episodes")
    parser.add_argument(
        "--world-models", nargs="+", default=[DEFAULT_WORLD_MODEL], help="checkpoints, by name or folder"
    )
    parser.add_argument("--num-steps", nargs="+", type=int, default=[], help="of diffusion models, a row for each")
    parser.add_argument("--baseline", help="the checkpoint that these must beat, for instance of kind irasim")
    parser.add_argument("--data", help="a data set instead of the twin's episodes")
    parser.add_argument("--feature-network", default=GABOR, help="of the Frechet distance; a name or a file")
    parser.add_argument("--out", type=Path, default=Path("outputs/fidelity"), help="where episodes are kept")
    arguments = parser.parse_args()
    names = [*arguments.world_models, *([arguments.baseline] if arguments.baseline else [])]
    for name in names:  # what cannot be done is said before hours are spent
        config = read_config(find_checkpoint(name))
        if "dynamics" not in config:
            parser.error(f"{name}: needs one world model, got {config.get('kind', 'a tokenizer')}")
        if config["kind"] == "diffusion" and name != arguments.baseline:
            for count in arguments.num_steps:
                replace(build_config(DiffusionConfig, config["dynamics"], Path(name)), num_steps=count)
    keep_freed_memory()
    cache = (
        open_caches([arguments.data], frame_shape=latent_tokenizer().frame_shape, beside=arguments.out)[0]
        if arguments.data
        else held_out_cache(arguments.out, 12 if arguments.quick else 100)
    )
    cache.require_actions()
    network = load_feature_network(arguments.feature_network)
    frames = np.asarray(cache.frames)
    truth = {"latents": latents_of(frames), "clips": clip_features(network, frames, cache)}
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, row: dict[str, float]) -> None:
        rows[name] = row
        print(f"{name:>24}  " + "  ".join(f"{column} {value:.3g}" for column, value in row.items()), flush=True)

    add(COPY, video_figures(frames[first_rows(cache)], cache, truth, network))
    for name in names:
        loaded, real = load_world_model(name), encode_cache(load_patch_tokenizer(name), cache)
        assert isinstance(loaded, TokenWorldModel | LatentWorldModel)
        for told, model in variants(loaded, [] if name == arguments.baseline else arguments.num_steps):
            timed_frames = 2 if arguments.quick else 20
            add(name + told, model_figures(model, cache, real, truth, network, timed_frames))
    figures = compared(rows, arguments.baseline) | {
        "rows": rows,
        "feature_network": arguments.feature_network,
        "episodes": len(cache),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": arguments.quick,
    }
    print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
