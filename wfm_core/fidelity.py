"""Does a world model do what its actions say? Held-out episodes under true, others' and no actions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import trange

from wfm_core.data.actions import ActionSpace
from wfm_core.data.clip_cache import ClipCache
from wfm_core.metrics import psnr
from wfm_core.rollouts import decode_cache, first_rows, imagine_cache
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.world_model import WorldModel

LEAST_DRAWS = 16
"""Rollouts under others' actions, however few the episodes are."""
RESAMPLES = 2000
PAIRS = 4000
"""Frames and the next ones from which the inverse dynamics are learnt, at most."""
RIDGE = (1.0, 10.0, 100.0, 1000.0)
"""Strengths of the ridge, of which the best on held-out pairs of the training data is taken."""


@dataclass(frozen=True)
class ActionFidelity:
    """What was found out; all in dB but the last three.

    Attributes:
        copy_db: PSNR of the first frame, shown all along.
        true_db: of rollouts under the episodes' own actions.
        shuffled_db: under those of other episodes.
        still_db: under actions that command nothing.
        shuffled_cost_db: mean of true less shuffled, of the same episodes.
        shuffled_cost_interval_db: its 95% interval, by bootstrap over rollouts.
        still_cost_db: mean of true less still.
        inverse_real: share of the actions' variance that a linear inverse-dynamics model reads off real frames.
        inverse_true: off frames imagined under the same actions.
        inverse_shuffled: off frames imagined under others', which nobody has ever filmed.
    """

    copy_db: float
    true_db: float
    shuffled_db: float
    still_db: float
    shuffled_cost_db: float
    shuffled_cost_interval_db: tuple[float, float]
    still_cost_db: float
    inverse_real: float
    inverse_true: float
    inverse_shuffled: float

    @property
    def follows(self) -> bool:
        """Whether other actions make other videos: beyond chance, the wrong ones cost something."""
        return self.shuffled_cost_interval_db[0] > 0

    def __str__(self) -> str:
        """What to think of it, in words."""
        low, high = self.shuffled_cost_interval_db
        verdict = "follows its actions" if self.follows else "IGNORES ITS ACTIONS"
        return (
            f"the model {verdict}: others' actions cost {self.shuffled_cost_db:.2f} dB [{low:.2f}, {high:.2f}], no "
            f"motion {self.still_cost_db:.2f} dB; {self.true_db:.2f} dB under true ones, the first frame "
            f"{self.copy_db:.2f}; actions read off frames (R2): real {self.inverse_real:.2f}, imagined "
            f"{self.inverse_true:.2f}, imagined under others' {self.inverse_shuffled:.2f}"
        )


def action_fidelity(
    model: WorldModel,
    codec: LatentCodec,
    held_out: ClipCache,
    real: np.ndarray,
    space: ActionSpace,
    training: Sequence[tuple[ClipCache, np.ndarray]],
    seed: int = 0,
) -> ActionFidelity:
    """Probe a world model.

    Args:
        model: the world model.
        codec: how its tokenizer's latents are kept.
        held_out: episodes that it was not trained on.
        real: (N, ...) their frames as kept (see `wfm_core.batches.encode_cache`).
        space: of the actions.
        training: clip caches and frames as kept, from which the inverse dynamics are learnt, and whose actions are
            others' actions too.
        seed: of whose actions are taken, and of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    own = held_out.columns["actions"]
    still = own[first_rows(held_out)].copy()
    still[:, : space.travel_dim] = 0
    frames = np.asarray(held_out.frames)

    def imagined_under(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept, decoded = roll_out(model, codec, held_out, real, actions)
        return kept, by_episode(held_out, psnr(decoded, frames))

    imagined, true_db = imagined_under(own)
    _, still_db = imagined_under(still)
    inverse = InverseDynamics(codec, training, rng)
    donors = [held_out, *(cache for cache, _ in training)]
    shuffled_db, recovered = [], []
    for _ in trange(-(-LEAST_DRAWS // len(held_out)), desc="others' actions"):
        others = others_actions(held_out, donors, rng)
        rolled, each_db = imagined_under(others)
        shuffled_db.append(each_db)
        recovered.append(inverse.explained(held_out, rolled, others))
    cost = np.concatenate([true_db - each for each in shuffled_db])
    means = rng.choice(cost, (RESAMPLES, len(cost))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return ActionFidelity(
        copy_db=float(by_episode(held_out, psnr(frames[first_rows(held_out)], frames)).mean()),
        true_db=float(true_db.mean()),
        shuffled_db=float(np.mean(shuffled_db)),
        still_db=float(still_db.mean()),
        shuffled_cost_db=float(cost.mean()),
        shuffled_cost_interval_db=(float(low), float(high)),
        still_cost_db=float((true_db - still_db).mean()),
        inverse_real=inverse.explained(held_out, real, own),
        inverse_true=inverse.explained(held_out, imagined, own),
        inverse_shuffled=float(np.mean(recovered)),
    )


def others_actions(cache: ClipCache, donors: Sequence[ClipCache], rng: np.random.Generator) -> np.ndarray:
    """Give each episode another one's actions, (N, A), from its start and if need be over and over.

    Raises:
        ValueError: there is no other episode.
    """
    pool = [(donor, k) for donor in donors for k in range(len(donor)) if donor.lengths[k] > 1]
    actions = np.empty_like(cache.columns["actions"])
    for k, (start, length) in enumerate(zip(cache.starts, cache.lengths, strict=True)):
        others = [entry for entry in pool if entry != (cache, k)]
        if not others:
            raise ValueError("shuffled actions need another episode, got one in all")
        donor, episode = others[rng.integers(len(others))]
        rows = donor.starts[episode] + np.arange(length) % (donor.lengths[episode] - 1)
        actions[start : start + length] = donor.columns["actions"][rows]
    return actions


class InverseDynamics:
    """Ridge regression of the action from two frames' latents and their difference."""

    def __init__(
        self, codec: LatentCodec, training: Sequence[tuple[ClipCache, np.ndarray]], rng: np.random.Generator
    ) -> None:
        """Learn from real frames; a quarter of the pairs chooses the ridge.

        Raises:
            ValueError: there are fewer than 8 pairs.
        """
        self.codec = codec
        pairs = [(cache, kept, _steps(cache)) for cache, kept in training]
        features = np.concatenate([self._features(kept, rows) for _, kept, rows in pairs])
        actions = np.concatenate([cache.columns["actions"][rows] for cache, _, rows in pairs]).astype(np.float64)
        chosen = rng.permutation(len(features))[:PAIRS]
        if len(chosen) < 8:
            raise ValueError(f"inverse dynamics need 8 pairs of frames, got {len(chosen)}")
        features, actions = features[chosen], actions[chosen]
        self.centre, self.scale = features.mean(axis=0), features.std() + 1e-6
        self.mean, self.spread = actions.mean(axis=0), actions.std(axis=0) + 1e-9
        x, y = (features - self.centre) / self.scale, (actions - self.mean) / self.spread
        cut = 3 * len(x) // 4
        errors = [np.square(x[cut:] @ _ridge(x[:cut], y[:cut], strength) - y[cut:]).mean() for strength in RIDGE]
        self.weights = _ridge(x, y, RIDGE[int(np.argmin(errors))])

    def explained(self, cache: ClipCache, kept: np.ndarray, actions: np.ndarray) -> float:
        """Share of the variance of actions (N, A) that is read off frames as kept (N, ...): the mean over dimensions.

        Dimensions that hardly vary here do not count.
        """
        rows = _steps(cache)
        wanted = (actions[rows] - self.mean) / self.spread
        found = (self._features(kept, rows) - self.centre) / self.scale @ self.weights
        spread = wanted.var(axis=0)
        counts = spread > 0.05
        return float((1 - np.square(found - wanted).mean(axis=0)[counts] / spread[counts]).mean())

    def _features(self, kept: np.ndarray, rows: np.ndarray) -> np.ndarray:
        before, after = (self.codec.unpack(kept[at]).flatten(1).numpy().astype(np.float64) for at in (rows, rows + 1))
        return np.concatenate([after - before, before], axis=1)


def _steps(cache: ClipCache) -> np.ndarray:
    """Rows of all frames that have a next one."""
    return np.setdiff1d(np.arange(len(cache.frames)), cache.starts + cache.lengths - 1)


def _ridge(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Weights (F, A) of centred features x (n, F) for targets y (n, A), solved among samples where these are fewer."""
    if len(x) < x.shape[1]:
        return x.T @ np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y)
    return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)


def roll_out(
    model: WorldModel, codec: LatentCodec, cache: ClipCache, real: np.ndarray, actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Imagine every episode from its first frame under actions (N, A): frames as kept, and (N, H, W, 3) uint8."""
    kept, _ = imagine_cache(model, codec, cache, real, actions=actions)
    return kept, decode_cache(model, codec, cache, real, kept)


def by_episode(cache: ClipCache, values: np.ndarray) -> np.ndarray:
    """Mean of values (N,) over the frames of each episode but its first, (E,)."""
    return np.array([values[a + 1 : a + n].mean() for a, n in zip(cache.starts, cache.lengths, strict=True)])
