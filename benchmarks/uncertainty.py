"""Does a world model know when it is wrong? Its own uncertainty, and the disagreement of several rollouts.

    python benchmarks/uncertainty.py [--quick] [--world-models NAME ...] [--rollouts 4] [--out FOLDER]

A limit is chosen on the episodes that `worldsim-record` makes of seed 2, so that a share --rates of ordinary episodes
exceeds it (worldsim/uncertainty.py), and tried on the 100 published held-out ones. Two measures of each world model:
its `own` (entropy of tokens; how far denoising moved away from its first guess), and how far --rollouts of it go apart
that differ in their seeds alone. A world model may be an ensemble (`worldsim-train stage=ensemble`): then `own` is how
far its members go apart, and there is no second measure. An error is the root mean square distance of imagined latents
from those of the true frame.

    false_alarms      share of held-out episodes that exceed the limit, with a 95% interval; the rate was promised
    spearman          rank correlation of uncertainty and error over all steps
    spearman_at_step  the same among episodes at the same step, averaged over steps: both grow with time anyhow
    auroc             probability that a step of the worst tenth is more uncertain than another
    error, kept_error mean error of all steps, and of those before an episode exceeds the limit
    kept              share of the steps before that

The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, spearmanr

from benchmarks.fidelity import held_out_cache
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import find_checkpoint, load_patch_tokenizer, load_world_model
from wfm_core.data.clip_cache import ClipCache
from wfm_core.encoding import encode_cache
from wfm_core.ensemble import Ensemble
from wfm_core.memory import keep_freed_memory
from wfm_core.rollouts import imagine_cache
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.world_model import WorldModel
from worldsim.caches import open_caches
from worldsim.commands.record import RecordConfig
from worldsim.commands.record import run as record
from worldsim.uncertainty import episode_limit, separation

CALIBRATION_SEED = 2
FEWEST = 10  # episodes that a correlation is of


def calibration_cache(out: Path, num_episodes: int) -> ClipCache:
    """Record (or reuse) the episodes on which limits are chosen."""
    folder = out / f"calibration_{num_episodes}"
    record(RecordConfig(out=str(folder), num_episodes=num_episodes, seed=CALIBRATION_SEED))
    return open_caches([str(folder)])[0]


def roll_out(
    model: WorldModel, codec: LatentCodec, cache: ClipCache, real: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Imagine all episodes; returns of each the uncertainties and the errors of its steps, (T - 1,)."""
    imagined, doubts = imagine_cache(model, codec, cache, real)
    errors = []
    for start, length in zip(cache.starts, cache.lengths, strict=True):
        rows = slice(start + 1, start + length)
        apart = codec.unpack(imagined[rows]) - codec.unpack(np.asarray(real[rows]))
        errors.append(apart.square().mean(dim=(1, 2, 3)).sqrt().numpy())
    return doubts, errors


def figures_of(
    ordinary: list[np.ndarray], doubts: list[np.ndarray], errors: list[np.ndarray], rates: list[float]
) -> dict[str, float | list[float] | None]:
    """Say how well uncertainties, of episodes to choose limits on and of others, foretell the errors of the others."""
    doubt, error = np.concatenate(doubts), np.concatenate(errors)
    worst = error >= np.quantile(error, 0.9)
    same = []
    for t in range(max(map(len, doubts))):
        there = [k for k, values in enumerate(doubts) if len(values) > t]
        pair = np.array([[doubts[k][t], errors[k][t]] for k in there])
        if len(there) >= FEWEST and (pair.std(axis=0) > 0).all():
            same.append(spearmanr(*pair.T).statistic)
    found: dict[str, float | list[float] | None] = {
        "spearman": float(spearmanr(doubt, error).statistic) if doubt.std() > 0 else None,
        "spearman_at_step": float(np.mean(same)) if same else None,
        "auroc": separation(doubt[~worst], doubt[worst]),
        "error": float(error.mean()),
    }
    for rate in rates:
        limit = episode_limit(ordinary, rate)
        over = [np.flatnonzero(values > limit) for values in doubts]
        until = [first[0] if len(first) else len(values) for first, values in zip(over, doubts, strict=True)]
        alarms = sum(len(first) > 0 for first in over)
        interval = binomtest(alarms, len(doubts)).proportion_ci(method="wilson")
        kept = np.concatenate([values[:end] for values, end in zip(errors, until, strict=True)])
        found |= {
            f"limit_{rate:g}": limit if np.isfinite(limit) else None,
            f"false_alarms_{rate:g}": alarms / len(doubts),
            f"false_alarms_{rate:g}_ci": [float(interval.low), float(interval.high)],
            f"kept_{rate:g}": len(kept) / len(error),
            f"kept_error_{rate:g}": float(kept.mean()) if len(kept) else None,
        }
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 episodes instead of 100, of either sort")
    parser.add_argument(
        "--world-models", nargs="+", default=[DEFAULT_WORLD_MODEL], help="checkpoints, by name or folder"
    )
    parser.add_argument("--rollouts", type=int, default=4, help="that disagree; 1 for a model's own uncertainty only")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.02, 0.1], help="shares of ordinary episodes")
    parser.add_argument("--out", type=Path, default=Path("outputs/fidelity"), help="where the episodes are kept")
    arguments = parser.parse_args()
    keep_freed_memory()
    count = 12 if arguments.quick else 100
    caches = calibration_cache(arguments.out, count), held_out_cache(arguments.out, count)
    rows: dict[str, dict] = {}
    for name in arguments.world_models:
        tokenizer, model = load_patch_tokenizer(name), load_world_model(find_checkpoint(name))
        measures = {"own": model}
        if arguments.rollouts > 1 and not isinstance(model, Ensemble):
            measures[f"{arguments.rollouts} rollouts"] = Ensemble([model] * arguments.rollouts)
        real = [encode_cache(tokenizer, cache) for cache in caches]
        for measure, measured in measures.items():
            (ordinary, _), (doubts, errors) = (
                roll_out(measured, tokenizer.codec, *given) for given in zip(caches, real, strict=True)
            )
            rows[f"{name}, {measure}"] = figures_of(ordinary, doubts, errors, arguments.rates)
    for name, row in rows.items():
        print(name)
        print("  " + "  ".join(f"{column} {value:.3g}" for column, value in row.items() if isinstance(value, float)))
    print(json.dumps({"rows": rows, "episodes": count, "quick": arguments.quick}, allow_nan=False))


if __name__ == "__main__":
    main()
