"""Does a world model do what its actions say? Held-out episodes under true, others' and no actions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import trange

from wfm_core.curation.measures import JUDGED, explained_motion, luma, motion
from wfm_core.data.actions import ActionSpace
from wfm_core.data.clip_cache import ClipCache
from wfm_core.metrics import mean_interval, psnr
from wfm_core.rollouts import first_rows, imagined_frames
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.world_model import WorldModel

LEAST_DRAWS = 16
"""Rollouts under others' actions, however few the episodes are."""


@dataclass(frozen=True)
class ActionFidelity:
    """What was found out; all in dB but the shares, NaN where all episodes are too short to tell.

    Attributes:
        copy_db: PSNR of the first frame, shown all along.
        true_db: of rollouts under the episodes' own actions.
        shuffled_db: under those of other episodes.
        still_db: under actions that command nothing.
        shuffled_cost_db: mean of true less shuffled, of the same episodes.
        shuffled_cost_interval_db: its 95% interval, by bootstrap over episodes; of a single one, over whose actions.
        still_cost_db: mean of true less still.
        motion_real: share of what moves in real frames that their actions explain.
        motion_true: likewise in frames imagined under the same actions.
        motion_shuffled: in frames imagined under others', which nobody has ever filmed, by these.
        episodes: how many were probed.
    """

    copy_db: float
    true_db: float
    shuffled_db: float
    still_db: float
    shuffled_cost_db: float
    shuffled_cost_interval_db: tuple[float, float]
    still_cost_db: float
    motion_real: float
    motion_true: float
    motion_shuffled: float
    episodes: int

    @property
    def follows(self) -> bool:
        """Whether other actions make other videos: beyond chance, the wrong ones cost something."""
        return self.shuffled_cost_interval_db[0] > 0

    def __str__(self) -> str:
        """What to think of it, in words."""
        low, high = self.shuffled_cost_interval_db
        verdict = "follows its actions" if self.follows else "IGNORES ITS ACTIONS"
        of = f"{self.episodes} held-out episode{'s' * (self.episodes > 1)}"
        return (
            f"the model {verdict}: on {of} others' actions cost {self.shuffled_cost_db:.2f} dB [{low:.2f}, "
            f"{high:.2f}], no motion {self.still_cost_db:.2f} dB; {self.true_db:.2f} dB under true ones, the first "
            f"frame {self.copy_db:.2f}; of what moves, actions explain {self.motion_real:.0%} in real frames, "
            f"{self.motion_true:.0%} in imagined ones, {self.motion_shuffled:.0%} under others'"
        )


def action_fidelity(
    model: WorldModel,
    codec: LatentCodec,
    held_out: ClipCache,
    real: np.ndarray,
    shown: np.ndarray,
    space: ActionSpace,
    donors: Sequence[ClipCache],
    seed: int = 0,
) -> ActionFidelity:
    """Probe a world model.

    Args:
        model: the world model.
        codec: how its tokenizer's latents are kept.
        held_out: episodes that it was not trained on, of two or more frames.
        real: (N, ...) their frames as kept (see `wfm_core.encoding.encode_cache`).
        shown: (N, H, W, 3) uint8, what the model imagines under the episodes' own actions.
        space: of the actions.
        donors: further clip caches whose actions are others' actions.
        seed: of whose actions are taken, and of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    own = held_out.columns["actions"]
    still = own[first_rows(held_out)].copy()
    still[:, : space.travel_dim] = 0
    frames = np.asarray(held_out.frames)

    def score(pictures: np.ndarray) -> np.ndarray:
        return by_episode(held_out, psnr(pictures, frames))

    true_db = score(shown)
    still_db = score(imagined_frames(model, codec, held_out, real, still))
    shuffled_db, explained = [], []
    for _ in trange(-(-LEAST_DRAWS // len(held_out)), desc="others' actions"):
        others = others_actions(held_out, [held_out, *donors], rng)
        under_others = imagined_frames(model, codec, held_out, real, others)
        shuffled_db.append(score(under_others))
        explained.append(motion_explained(held_out, under_others, others, space))
    cost = true_db - np.array(shuffled_db)  # (draws, episodes)
    return ActionFidelity(
        copy_db=float(score(frames[first_rows(held_out)]).mean()),
        true_db=float(true_db.mean()),
        shuffled_db=float(np.mean(shuffled_db)),
        still_db=float(still_db.mean()),
        shuffled_cost_db=float(cost.mean()),
        shuffled_cost_interval_db=mean_interval(cost.mean(axis=0) if len(held_out) > 1 else cost[:, 0], rng),
        still_cost_db=float((true_db - still_db).mean()),
        motion_real=motion_explained(held_out, frames, own, space),
        motion_true=motion_explained(held_out, shown, own, space),
        motion_shuffled=float(np.mean(explained)),
        episodes=len(held_out),
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


def motion_explained(cache: ClipCache, frames: np.ndarray, actions: np.ndarray, space: ActionSpace) -> float:
    """Share of what moves in frames (N, H, W, 3) that actions (N, A) explain, by episode; NaN if all are short.

    The map from one to the other is linear and each episode's own, so it takes no training and knows no camera.
    """
    found = []
    for start, length in zip(cache.starts, cache.lengths, strict=True):
        if length <= JUDGED:
            continue
        told = actions[start : start + length - 1].astype(np.float64)
        ways = told[:, : space.travel_dim][:, :3] if space.travel_dim else np.diff(told, axis=0, prepend=told[:1])
        found.append(explained_motion(ways, motion(luma(frames[start : start + length]))))
    return float(np.mean(found)) if found else float("nan")


def by_episode(cache: ClipCache, values: np.ndarray) -> np.ndarray:
    """Mean of values (N,) over the frames of each episode but its first, (E,)."""
    return np.array([values[a + 1 : a + n].mean() for a, n in zip(cache.starts, cache.lengths, strict=True)])
