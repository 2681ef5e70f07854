"""What the heads learn from and how their thresholds are set."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import REWARD_TERMS, SUCCESS_HOLD_STEPS, held
from wfm_core.checkpoint import (
    ENSEMBLE,
    load_patch_tokenizer,
    load_world_model,
    read_config,
    wherever,
    world_digest,
    write_config,
)
from wfm_core.data.clip_cache import ClipCache
from wfm_core.encoding import encode_cache
from wfm_core.rollouts import imagine_cache
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.train import Batch
from wfm_core.world_model import no_motion
from worldsim.dynamics_data import places
from worldsim.heads import Heads, load_heads
from worldsim.simulator import Calibration
from worldsim.uncertainty import episode_limit

FALSE_ALARM_RATE = 0.02
"""Fraction of ordinary held-out episodes that the uncertainty limit may cut short."""
LATER_REFERENCES = 0.5
"""Fraction of the pairs whose reference is not the episode's first frame, but one between that and the pair."""
NEARLY_REACHED = 0.6
"""Reward for reaching (8 cm away) from which on a moment counts as one that decides."""
CHANCE = 2.0
"""Standard deviations by which misses and inventions may differ before a threshold counts as unfair."""


class HeadsBatches:
    """Pairs of consecutive frames with the labels of the second, for `Heads.forward`; half of them at the outcome."""

    def __init__(
        self,
        heads: Heads,
        codec: LatentCodec,
        caches: Sequence[ClipCache],
        kept: Sequence[np.ndarray],
        batch_size: int,
        seed: int,
    ) -> None:
        """Join the caches.

        Args:
            heads: says which instruction has which number and the shape of latents.
            codec: how the tokenizer's latents are kept.
            caches: with labels "reward.<term>" and "failure".
            kept: per cache (N, ...) of all frames; a cache may come twice, with real and with imagined frames.
            batch_size: pairs of a batch.
            seed: of the sequence of batches.

        Raises:
            ValueError: a cache lacks labels.
        """
        labels = ("agent_pos", "failure", *(f"reward.{term}" for term in REWARD_TERMS))
        for cache in caches:
            if lacking := [name for name in labels if name not in cache.columns]:
                raise ValueError(f"{cache.directory}: heads learn from labels that this data set lacks: {lacking}")
        self.codec, self.batch_size, self.seed = codec, batch_size, seed
        self.kept = np.concatenate(list(kept))
        self.columns = {name: np.concatenate([cache.columns[name] for cache in caches]) for name in labels}
        self.actions = np.concatenate([action_pairs(cache) for cache in caches])
        self.places = np.concatenate([places(cache) for cache in caches]) if heads.config.places_weight else None
        self.instruction = np.concatenate([instruction_ids(heads, cache) for cache in caches])
        last = np.concatenate([np.isin(np.arange(len(c.frames)), c.starts + c.lengths - 1) for c in caches])
        self.rows = np.flatnonzero(~last)  # the first frame of each pair
        sizes = np.cumsum([0, *(len(cache.frames) for cache in caches)])
        starts = [size + np.repeat(c.starts, c.lengths) for size, c in zip(sizes, caches, strict=False)]
        self.starts = np.concatenate(starts)  # the first frame of each one's episode
        after = self.rows + 1
        near = (self.columns["reward.success"][after] > 0.5) | (self.columns["reward.transport"][after] > 0.6)
        near |= self.columns["failure"][after].astype(bool)
        # Where nothing is to be moved, and so transport means nothing, hits and near misses differ by a finger's width.
        near |= (self.columns["reward.transport"][after] == 0) & (self.columns["reward.reach"][after] > NEARLY_REACHED)
        weight = np.where(near, 1 / max(1, near.sum()), 1 / max(1, (~near).sum()))
        self.cumulative = np.cumsum(weight) / weight.sum()

    def __call__(self, step: int) -> Batch:
        """Return the batch that `Heads.forward` describes."""
        rng = np.random.default_rng([self.seed, step])
        before = self.rows[np.searchsorted(self.cumulative, rng.random(self.batch_size)).clip(max=len(self.rows) - 1)]
        pair = before[:, None] + np.arange(2)
        # Imagination begins at first or, of training by reinforcement for instance, anywhere later.
        later = rng.random(self.batch_size) < LATER_REFERENCES
        start = self.starts[before]
        reference = np.where(later, rng.integers(start, before + 1), start)
        where = {} if self.places is None else {"places": torch.from_numpy(self.places[pair[:, 1]])}
        terms = np.stack([self.columns[f"reward.{term}"][pair[:, 1]] for term in REWARD_TERMS], axis=1)
        return where | {
            "latents": self.codec.unpack(self.kept[pair]),
            "agent_pos": torch.from_numpy(self.columns["agent_pos"][pair]),
            "actions": torch.from_numpy(self.actions[before]),
            "instruction_id": torch.from_numpy(self.instruction[before]),
            "reference": self.codec.unpack(self.kept[reference]),
            "reward_terms": torch.from_numpy(terms.astype(np.float32)),
            "failure": torch.from_numpy(self.columns["failure"][pair[:, 1]]),
            "seed": torch.tensor(self.seed * 1_000_003 + step),
        }


def action_pairs(cache: ClipCache) -> np.ndarray:
    """The physical actions before and after each frame of a cache, (N, 2, 7); before an episode no motion."""
    after = cache.columns["actions"]
    before = np.concatenate([after[:1], after[:-1]])
    before[cache.starts] = no_motion(torch.from_numpy(cache.columns["agent_pos"][cache.starts])).numpy()
    return np.stack([before, after], axis=1)


def instruction_ids(heads: Heads, cache: ClipCache) -> np.ndarray:
    """Number of the instruction at each frame of a cache, (N,) int64."""
    ids = np.array([heads.instruction_id(episode["instruction"]) for episode in cache.episodes], dtype=np.int64)
    return np.repeat(ids, cache.lengths)


@torch.no_grad()
def judge_episodes(
    heads: Heads, codec: LatentCodec, cache: ClipCache, kept: np.ndarray, batch_size: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Success and failure probabilities (N,) at each frame of a cache; 0 at each episode's first frame."""
    success, failure = np.zeros(len(cache.frames)), np.zeros(len(cache.frames))
    rows = np.setdiff1d(np.arange(len(cache.frames)), cache.starts)
    ids, actions = instruction_ids(heads, cache), action_pairs(cache)
    first = np.repeat(cache.starts, cache.lengths)
    for chunk in np.array_split(rows, max(1, len(rows) // batch_size)):
        pair = chunk[:, None] + np.arange(-1, 1)
        out = heads.read(
            codec.unpack(kept[pair]),
            torch.from_numpy(cache.columns["agent_pos"][chunk - 1]),
            torch.from_numpy(actions[chunk - 1]),
            torch.from_numpy(ids[chunk]),
            codec.unpack(kept[first[chunk]]),
        )
        success[chunk], failure[chunk] = out.success.numpy(), out.failure.numpy()
    return success, failure


def fair_threshold(truth: Sequence[np.ndarray], probability: Sequence[np.ndarray], steps: int) -> float:
    """Threshold at which as many episodes are said to hold (for `steps` frames) as do: misses and inventions balance.

    What is ranked are rates, and a rate should not be off to one side, even where a few more single verdicts would be
    right. Ties go to the most right verdicts, then to the middle of the widest range, far from either kind of error.
    """
    grid = np.linspace(0.05, 0.95, 91)
    outcome = np.array([held(flags, steps) for flags in truth])
    verdict = np.array([[held(p >= limit, steps) for p in probability] for limit in grid])
    bias = np.abs(verdict.mean(axis=1) - outcome.mean())
    score = np.mean(verdict == outcome, axis=1) - len(outcome) * bias  # one episode of bias outweighs all verdicts
    best = np.flatnonzero(np.isclose(score, score.max()))
    widest = max(np.split(best, np.flatnonzero(np.diff(best) > 1) + 1), key=len)
    return float(np.median(grid[widest]))


def is_unfair(threshold: float, truth: Sequence[np.ndarray], probability: Sequence[np.ndarray], steps: int) -> bool:
    """Whether misses and inventions at a threshold differ by more than chance would have it (McNemar's test)."""
    outcome = np.array([held(flags, steps) for flags in truth])
    verdict = np.array([held(p >= threshold, steps) for p in probability])
    misses, inventions = (outcome & ~verdict).sum(), (verdict & ~outcome).sum()
    return bool(abs(int(misses) - int(inventions)) > CHANCE * np.sqrt(misses + inventions))


def put_together(members: Sequence[str], caches: Sequence[ClipCache], checkpoint: Path) -> None:
    """Write a checkpoint that is others together (`wfm_core.ensemble.Ensemble`), with limits of its own.

    Args:
        members: two or more world models, by shipped name or folder; one may come several times.
        caches: held-out episodes with labels, on which its limits are set.
        checkpoint: its folder.

    Raises:
        ValueError: a member is none or is an ensemble itself, they have different tokenizers, there is another
            checkpoint in the folder, or copies of a model that draws nothing never disagree.
    """
    config = read_config(checkpoint) if (checkpoint / "config.json").exists() else {"kind": ENSEMBLE}
    if config.get("kind") != ENSEMBLE:
        raise ValueError(f"out must be a new folder or that of an ensemble, got a checkpoint in {checkpoint}")
    names = [wherever(name) for name in members]
    digests = [world_digest(name) for name in names]
    first, *others = (load_patch_tokenizer(name).state_dict() for name in names)
    for other in others:
        if other.keys() != first.keys() or any(not torch.equal(other[key], first[key]) for key in first):
            raise ValueError(f"members must share a tokenizer, got different ones in {names}")
    write_config(checkpoint, {"kind": ENSEMBLE, "members": names, "digests": digests})
    limits = calibrate(checkpoint, caches)
    if limits["uncertainty_limit"] == 0:
        raise ValueError(f"members must differ or draw at random, got {names}, which never disagree")
    write_config(checkpoint, read_config(checkpoint) | {"calibration": limits})


def calibrate(checkpoint: Path, caches: Sequence[ClipCache], batch_size: int = 64) -> dict[str, Any]:
    """Set a checkpoint's thresholds on held-out episodes, both as filmed and as rolled out by its own world model.

    Whether a spoon lies on a towel is easier to see than whether a gripper is within 2 cm of a marker, so one threshold
    for all may call one task's policies too good or too bad; an instruction for which it does gets its own.

    Args:
        checkpoint: folder with tokenizer, dynamics and heads.
        caches: held-out episodes with labels.
        batch_size: episodes rolled out at once.

    Returns:
        The values of `worldsim.simulator.Calibration`.
    """
    tokenizer, heads, model = load_patch_tokenizer(checkpoint), load_heads(checkpoint), load_world_model(checkpoint)
    truth: dict[str, list[np.ndarray]] = {"success": [], "failure": []}
    judged: dict[str, list[np.ndarray]] = {"success": [], "failure": []}
    instructions: list[str] = []
    uncertainties: list[np.ndarray] = []
    for cache in caches:
        real = encode_cache(tokenizer, cache)
        imagined, doubts = imagine_cache(model, tokenizer.codec, cache, real, batch_size)
        uncertainties += doubts
        for kept in (real, imagined):
            instructions += [episode["instruction"] for episode in cache.episodes]
            probability = dict(zip(judged, judge_episodes(heads, tokenizer.codec, cache, kept), strict=True))
            for start, length in zip(cache.starts, cache.lengths, strict=True):
                window = slice(start, start + length)
                for name in judged:
                    truth[name].append(cache.columns[name][window].astype(bool))
                    judged[name].append(probability[name][window])

    shared = fair_threshold(truth["success"], judged["success"], SUCCESS_HOLD_STEPS)
    own = {}
    for text in sorted(set(instructions)):
        episodes = [k for k, instruction in enumerate(instructions) if instruction == text]
        flags, probabilities = ([values["success"][k] for k in episodes] for values in (truth, judged))
        if is_unfair(shared, flags, probabilities, SUCCESS_HOLD_STEPS):
            own[text] = fair_threshold(flags, probabilities, SUCCESS_HOLD_STEPS)
    return asdict(
        Calibration(
            success_threshold=shared,
            failure_threshold=fair_threshold(truth["failure"], judged["failure"], 1),
            uncertainty_limit=episode_limit(uncertainties, FALSE_ALARM_RATE),
            success_thresholds=own,
        )
    )
