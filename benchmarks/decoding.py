"""Which way of decoding? Quality, obedience and speed of each, and how quality falls with the length of a rollout.

    python benchmarks/decoding.py [--quick] [--drift-only] [--world-model NAME ...] [--data FOLDER]

Held-out twin episodes, recorded for 160 steps whatever happens (`worldsim-record` with seed 1), are imagined from their
first frame under their true actions, and once more under those of another episode of the same instruction: what that
costs is the action fidelity. Every way that the checkpoint's family has is tried: strictly token by token, with drafts
if it has draft heads, whole frames in 1, 2, 4, ... passes (of the refiner, in the nano family) or steps of diffusion,
chunks of frames if it learnt them; the baseline imagines a whole clip at once. The Frechet distance is between features
of single frames, each averaged over its positions, of the network that the figures name: it is neither FID nor FVD.

The drift curve is of the checkpoint's own way, in stretches as long as what it looks back on (the Llama-style decoder:
its rotary span; the others: their window or clip), up to 10 of them, as far as the episodes reach. Name two
checkpoints, trained with and without corruption of the context, to compare their curves. Nothing else should be
computing on the machine meanwhile. The last line is one JSON object.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.fidelity import HELD_OUT_SEED
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import find_checkpoint, load_patch_tokenizer, load_world_model
from wfm_core.data.clip_cache import ClipCache
from wfm_core.encoding import encode_cache
from wfm_core.memory import keep_freed_memory
from wfm_core.metrics import frechet_distance, psnr
from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.models.irasim import IrasimConfig
from wfm_core.models.latent_world_model import LatentWorldModel
from wfm_core.models.token_world_model import TokenWorldModel
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.rollouts import first_rows, imagined_frames, swapped_actions
from wfm_core.tokenizers.perceptual import GABOR, frame_features, load_feature_network
from wfm_core.world_model import ModelState
from worldsim.caches import open_caches
from worldsim.commands.record import RecordConfig
from worldsim.commands.record import run as record

type Model = TokenWorldModel | LatentWorldModel

LONGEST = 160  # steps of an episode
STRETCHES = 10  # training contexts that the drift curve reaches
ROWS = (1, 16)  # batch sizes at which speed is measured


def held_out_cache(out: Path, num_episodes: int) -> ClipCache:
    """Record (or reuse) long held-out episodes."""
    folder = out / f"long_{num_episodes}"
    config = RecordConfig(out=str(folder), num_episodes=num_episodes, seed=HELD_OUT_SEED)
    record(replace(config, max_steps=LONGEST, settle_steps=LONGEST, still_steps=0))
    return open_caches([str(folder)])[0]


def shortened(cache: ClipCache, num_episodes: int, num_frames: int) -> tuple[ClipCache, np.ndarray]:
    """The first frames of the first episodes, copied to memory, and their rows in the cache."""
    lengths = np.minimum(cache.lengths[:num_episodes], num_frames)
    rows = np.concatenate([start + np.arange(n) for start, n in zip(cache.starts, lengths, strict=False)])
    short = copy.copy(cache)
    short.frames = cache.frames[rows]
    short.columns = {name: column[rows] for name, column in cache.columns.items()}
    short.lengths, short.starts, short.episodes = lengths, np.cumsum(lengths) - lengths, cache.episodes[:num_episodes]
    return short, rows


def ways(config: Any, most_passes: int) -> dict[str, dict[str, Any]]:
    """Name -> the settings of each way in which a checkpoint's family decodes."""
    passes = [2**k for k in range(10) if 2**k <= most_passes]
    if isinstance(config, AutoregressiveConfig):
        return {f"parallel_{k}": {"refine_steps": k} for k in [*passes, config.grid**2]}
    if isinstance(config, IrasimConfig):
        return {f"steps_{k}": {"num_steps": k} for k in passes}
    if isinstance(config, DiffusionConfig):
        found = {f"steps_{k}": {"num_steps": k, "chunk": 1} for k in passes}
        return found | ({f"chunks_of_{config.chunk}": {}} if config.chunk > 1 else {})
    found: dict[str, dict[str, Any]] = {"raster": {"decoding": "raster"}}
    if config.num_draft_heads:
        found["speculative"] = {"decoding": "speculative"}
    if config.parallel:
        found |= {f"parallel_{k}": {"decoding": "parallel", "refine_steps": k} for k in passes}
    return found


def context_frames(config: Any) -> int:
    """Frames that the model was trained to look back on."""
    if isinstance(config, IrasimConfig):
        return config.num_frames
    return round(config.rope.longest) if isinstance(config, TransformerConfig) else config.window


def stepwise(config: Any) -> Any:
    """The configuration under which a model imagines frame by frame, as an environment asks for them, if it can."""
    return replace(config, chunk=1) if isinstance(config, DiffusionConfig) else config


def at_once(config: Any) -> int:
    """Frames that the model imagines together."""
    return config.chunk if isinstance(config, DiffusionConfig | IrasimConfig) else 1


def speed_figures(model: Model, cache: ClipCache, real: np.ndarray, num_frames: int) -> dict[str, float]:
    """Frames a second at each number of rows, pixels left out, and the passes that a frame of one row takes.

    At least `num_frames` frames are timed.
    """
    figures, calls = {}, []
    dynamics: Any = model.dynamics
    hook = dynamics.norm.register_forward_hook(lambda *_: calls.append(1))  # once a pass in every family
    chunk = at_once(dynamics.config)
    num_steps = math.ceil(num_frames / chunk)

    def advance(state: ModelState, action: torch.Tensor) -> ModelState:
        if isinstance(model, LatentWorldModel):
            return model.step_chunk(state, action[:, None].expand(-1, chunk, -1))[0]
        return model.step(state, action)[0]

    first = model.tokenizer.codec.unpack(real[cache.starts[:1]])
    for rows in ROWS:
        action = torch.from_numpy(cache.columns["actions"][:1]).repeat(rows, 1)
        state = model.start(first[:, None].repeat(rows, 1, 1, 1, 1), action[:, None][:, :0], range(rows))
        state = advance(state, action)
        calls.clear()
        begun = time.perf_counter()
        for _ in range(num_steps):
            state = advance(state, action)
        figures[f"frames_per_s_b{rows}"] = rows * num_steps * chunk / (time.perf_counter() - begun)
        if rows == 1:
            figures["passes_per_frame"] = len(calls) / (num_steps * chunk)
    hook.remove()
    return figures


def imagine(model: Model, cache: ClipCache, real: np.ndarray, actions: np.ndarray | None = None) -> np.ndarray:
    """Frames (N, H, W, 3) of all episodes, each imagined from its true first one, under other actions if given."""
    dynamics: Any = model.dynamics
    return imagined_frames(model, model.codec, cache, real, actions, at_once(dynamics.config))


def quality_figures(model: Model, cache: ClipCache, real: np.ndarray, network: nn.Module) -> dict[str, float]:
    """Figures over all imagined frames."""
    told = np.arange(len(real)) != first_rows(cache)
    true = cache.frames[told]
    swapped = swapped_actions(cache, np.random.default_rng(0))
    obeying, disobeying = (imagine(model, cache, real, actions)[told] for actions in (None, swapped))
    value = float(psnr(obeying, true).mean())
    return {
        "psnr_db": value,
        "frechet": frechet_distance(frame_features(network, obeying), frame_features(network, true)),
        "shuffled_cost_db": value - float(psnr(disobeying, true).mean()),
    }


def drift_curve(cache: ClipCache, imagined: np.ndarray, stretch: int, network: nn.Module) -> list[dict[str, float]]:
    """Quality of imagined frames (N, H, W, 3) by how far they lie from the true one, in stretches of equal length."""
    horizon = np.arange(len(imagined)) - first_rows(cache)
    curve = []
    for k in range(STRETCHES):
        here = (horizon > k * stretch) & (horizon <= (k + 1) * stretch)
        if here.sum() < 2:
            break
        true = cache.frames[here]
        curve.append(
            {
                "first": k * stretch + 1,
                "last": int(horizon[here].max()),
                "frames": int(here.sum()),
                "psnr_db": float(psnr(imagined[here], true).mean()),
                "copy_db": float(psnr(cache.frames[first_rows(cache)[here]], true).mean()),
                "frechet": frechet_distance(frame_features(network, imagined[here]), frame_features(network, true)),
            }
        )
    return curve


def figures_of(
    name: str, cache: ClipCache, network: nn.Module, *, quick: bool, most_passes: int, drift_only: bool
) -> dict[str, Any]:
    """All figures of one checkpoint, by name or folder."""
    checkpoint = find_checkpoint(name)
    model = load_world_model(checkpoint)
    assert isinstance(model, TokenWorldModel | LatentWorldModel)
    real = encode_cache(load_patch_tokenizer(checkpoint), cache)
    dynamics: Any = model.dynamics
    own = dynamics.config
    stretch = context_frames(own)
    short, rows = shortened(cache, 4 if quick else 32, 8 if quick else 32)
    found = {}
    for way, settings in ({} if drift_only else ways(own, most_passes)).items():
        dynamics.config = replace(own, **settings)
        found[way] = quality_figures(model, short, real[rows], network)
        found[way] |= speed_figures(model, short, real[rows], 2 if quick else 20)
        print(f"{name:>20} {way:<14}" + "  ".join(f"{k} {v:.3g}" for k, v in found[way].items()))
    dynamics.config = stepwise(own)
    whole, rows = shortened(cache, 4 if quick else len(cache), STRETCHES * stretch + 1)
    curve = drift_curve(whole, imagine(model, whole, real[rows]), stretch, network)
    for row in curve:
        print(
            f"{name:>20} frames {row['first']}-{row['last']}: PSNR {row['psnr_db']:.2f} dB, "
            f"copy {row['copy_db']:.2f} dB, Frechet {row['frechet']:.3g}"
        )
    return {"ways": found, "drift": curve, "context_frames": stretch}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 short episodes")
    parser.add_argument(
        "--world-model", nargs="+", default=[DEFAULT_WORLD_MODEL], help="checkpoints, by name or folder"
    )
    parser.add_argument("--data", help="a data set instead of the twin's episodes")
    parser.add_argument("--most-passes", type=int, default=8, help="of frames that are decoded at once")
    parser.add_argument("--drift-only", action="store_true", help="leave out the ways of decoding")
    parser.add_argument("--feature-network", default=GABOR, help="of the Frechet distance; a name or a file")
    parser.add_argument("--out", type=Path, default=Path("outputs/decoding"))
    arguments = parser.parse_args()
    keep_freed_memory()
    cache = (
        open_caches([arguments.data])[0]
        if arguments.data
        else held_out_cache(arguments.out, 4 if arguments.quick else 32)
    )
    network = load_feature_network(arguments.feature_network)
    wanted = {"quick": arguments.quick, "most_passes": arguments.most_passes, "drift_only": arguments.drift_only}
    found = {name: figures_of(name, cache, network, **wanted) for name in arguments.world_model}
    figures = {
        "world_models": found,
        "feature_network": arguments.feature_network,
        "episodes": len(cache),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": arguments.quick,
    }
    print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
