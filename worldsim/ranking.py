"""Statistics of success rates, and of how well one world's ranking of policies agrees with another's.

Pure functions of arrays. Throughout, `real` is the reference (robot or physics twin) and `imagined` the world model;
the two are keyword-only because MMRV and top-1 regret are not symmetric in them. Statistics work on the last axis, so
that one call scores all resamples at once.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol

import numpy as np

NUM_RESAMPLES = 2000
"""Bootstrap and permutation resamples."""

_TOLERANCE = 1e-12  # a permuted statistic this close to the observed one counts as equal to it
_CHUNK = 256  # resamples scored at once; pairwise statistics hold (chunk, N, N) arrays


@dataclass(frozen=True)
class Estimate:
    """A value, its two-sided interval and a p-value (None where there is no null hypothesis).

    `value` is nan where the statistic is undefined (a correlation with a constant).
    """

    value: float
    low: float
    high: float
    p_value: float | None = None


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate.

    Args:
        successes: number of successes, 0..trials.
        trials: number of trials; 0 gives (0, 1).
        confidence: two-sided coverage in (0, 1).

    Raises:
        ValueError: `successes` is not in 0..trials or `confidence` not in (0, 1).

    Source: Wilson, JASA 1927.
    """
    _check_counts(successes, trials, confidence)
    if trials == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    rate = successes / trials
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    # At 0 and at `trials` one end is exact; rounding must not push it past the rate.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def clopper_pearson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact (conservative) Clopper-Pearson interval of a success rate; arguments as `wilson_interval`.

    Raises:
        ValueError: `successes` is not in 0..trials or `confidence` not in (0, 1).
    """
    _check_counts(successes, trials, confidence)
    from scipy.special import betaincinv  # here, because importing it takes a second

    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate the difference in success rate a - b of two policies run on the same episodes.

    Episodes are resampled within each task. Half a win and half a loss are spread over the resampled tasks, so that a
    clean sweep does not claim a zero-width interval. The p-value is McNemar's exact two-sided one.

    Args:
        a: (T, E) bool, outcomes on T tasks and E episodes.
        b: (T, E) bool, outcomes of the other policy, episode by episode the same initial state and seed.
        rng: source of the resamples.
        num_resamples: number of resamples.
        confidence: two-sided coverage.

    Raises:
        ValueError: the shapes differ or are not (T, E) with E >= 1.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"paired outcomes must have one shape (T, E) with E >= 1, got {a.shape} and {b.shape}")
    num_tasks, num_episodes = a.shape
    wins, losses = (a & ~b).sum(1), (b & ~a).sum(1)
    counts = np.stack([wins, num_episodes - wins - losses, losses], axis=-1) + np.array([0.5, 0.0, 0.5]) / num_tasks
    draws = rng.multinomial(num_episodes, counts / counts.sum(-1, keepdims=True), size=(num_resamples, num_tasks))
    differences = (draws[..., 0] - draws[..., 2]).sum(1) / a.size
    num_wins, num_losses = int(wins.sum()), int(losses.sum())
    num_apart = num_wins + num_losses
    p_value = min(1.0, 2 * sum(math.comb(num_apart, k) for k in range(min(num_wins, num_losses) + 1)) / 2**num_apart)
    return _estimate((num_wins - num_losses) / a.size, differences, p_value, confidence)


class Statistic(Protocol):
    """A statistic over the last axis of two arrays of success rates."""

    def __call__(self, *, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
        """Map two (..., N) float arrays to (...) values."""
        ...


def pearson(*, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Return Pearson's r of (..., N) rates; nan where either side is constant."""
    x = imagined - imagined.mean(-1, keepdims=True)
    y = real - real.mean(-1, keepdims=True)
    constant = (np.ptp(imagined, axis=-1) == 0) | (np.ptp(real, axis=-1) == 0)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.where(constant, np.nan, (x * y).sum(-1) / np.where(constant, 1.0, scale))


def spearman(*, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Return Spearman's rho of (..., N) rates, ties at their mid-rank; nan where either side is constant."""
    return pearson(real=_midranks(real), imagined=_midranks(imagined))


def kendall(*, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Return Kendall's tau-b of (..., N) rates; nan where either side is constant."""
    x = np.sign(imagined[..., :, None] - imagined[..., None, :])
    y = np.sign(real[..., :, None] - real[..., None, :])
    scale = np.sqrt((x * x).sum((-2, -1)) * (y * y).sum((-2, -1)))
    return np.where(scale == 0, np.nan, (x * y).sum((-2, -1)) / np.where(scale == 0, 1.0, scale))


def mmrv(*, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Return the mean maximum rank violation of (..., N) rates, in success-rate points; 0 is best.

    (1/N) sum_i max_j |R_i - R_j| [(S_i < S_j) != (R_i < R_j)] with R real and S imagined: strict comparisons, the gap
    on the real side. A pair tied in imagination only is charged to the policy that is really worse.

    Source: SIMPLER (Li et al., CoRL 2024), Eq. 1.
    """
    gap = np.abs(real[..., :, None] - real[..., None, :])
    violated = (imagined[..., :, None] < imagined[..., None, :]) != (real[..., :, None] < real[..., None, :])
    return (gap * violated).max(-1).mean(-1)


def top1_regret(*, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Return what deploying the policy ranked first in imagination costs, in real success-rate points.

    Where several policies tie for first, the worst of them counts.
    """
    chosen = imagined == imagined.max(-1, keepdims=True)
    return real.max(-1) - np.where(chosen, real, np.inf).min(-1)


def bias(*, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Return the mean of imagined - real over (..., N): positive where imagination flatters."""
    return (imagined - real).mean(-1)


def mean_absolute_error(*, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Return the mean of |imagined - real| over (..., N)."""
    return np.abs(imagined - real).mean(-1)


STATISTICS: dict[str, tuple[Statistic, Literal["higher", "lower", "zero"]]] = {
    "pearson": (pearson, "higher"),
    "spearman": (spearman, "higher"),
    "kendall": (kendall, "higher"),
    "mmrv": (mmrv, "lower"),
    "top1_regret": (top1_regret, "lower"),
    "bias": (bias, "zero"),
    "mean_absolute_error": (mean_absolute_error, "lower"),
}
"""Agreement statistics by name, and which way is better."""

CELL_STATISTICS = ("pearson", "spearman", "kendall", "bias", "mean_absolute_error")
"""Those that mean something over (policy, task) cells, where there is no one policy to choose."""


@dataclass(frozen=True)
class Agreement:
    """How well imagination agrees with the reference.

    Attributes:
        policies: statistic name -> estimate over the policies' success rates (mean over tasks).
        cells: statistic name -> estimate over the (policy, task) success rates.
        num_policies: number of policies P.
        num_tasks: number of tasks T.
        num_episodes: number of episodes E in a cell.
        notes: what a reader must know: ties, a constant predictor, too few policies.
    """

    policies: dict[str, Estimate]
    cells: dict[str, Estimate]
    num_policies: int
    num_tasks: int
    num_episodes: int
    notes: tuple[str, ...]


def agreement(
    *,
    real: np.ndarray,
    imagined: np.ndarray,
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
) -> Agreement:
    """Score the agreement of two worlds over policies and over (policy, task) cells.

    Intervals: percentile bootstrap over policies, with the episodes of each drawn policy resampled too (an episode
    keeps its outcome in both worlds together). As episode noise then enters twice, the intervals lean to the
    pessimistic side. p-values: the imagined results are dealt to the policies at random, all tasks of a policy
    together, so that tasks being easy or hard is no evidence; one-sided. For the bias, the sign of each policy's
    difference is flipped at random; two-sided. Small families of permutations are enumerated: with P policies no
    p-value is below 1 / P!.

    Args:
        real: (P, T, E) bool, success in the reference of P policies on T tasks and E episodes.
        imagined: (P, T, E) bool, success of the same episodes in the world model.
        rng: source of the resamples.
        num_resamples: number of resamples.
        confidence: two-sided coverage of the intervals.

    Raises:
        ValueError: the shapes differ or are not (P, T, E) with every length at least 1.
    """
    real, imagined = np.asarray(real, dtype=bool), np.asarray(imagined, dtype=bool)
    if real.shape != imagined.shape or real.ndim != 3 or real.size == 0:
        raise ValueError(
            f"outcomes must have one shape (P, T, E) without a 0, got real {real.shape} and imagined {imagined.shape}"
        )
    num_policies, num_tasks, num_episodes = real.shape
    resampled = _resample(real, imagined, rng, num_resamples)
    permutations = np.stack(list(_permutations(num_policies, num_resamples, rng)))  # (M, P)
    flips = np.stack(list(_sign_flips(num_policies, num_resamples, rng)))  # (M, P)
    tables = {}
    for level, axes in {"policies": (1, 2), "cells": (2,)}.items():
        real_rates = real.mean(axes).reshape(num_policies, -1)  # (P, 1) or (P, T)
        imagined_rates = imagined.mean(axes).reshape(num_policies, -1)
        # Whole counts are divided once, so that equal rates are equal numbers and ties stay ties.
        real_draws, imagined_draws = (
            draws.sum(2) / (num_tasks * num_episodes) if level == "policies" else draws / num_episodes
            for draws in resampled
        )
        table = {}
        for name in STATISTICS if level == "policies" else CELL_STATISTICS:
            statistic, better = STATISTICS[name]
            value = float(statistic(real=real_rates.ravel(), imagined=imagined_rates.ravel()))
            draws = _score(statistic, real_draws.reshape(num_resamples, -1), imagined_draws.reshape(num_resamples, -1))
            if better == "zero":
                difference = (imagined_rates - real_rates).mean(1)
                null = (flips * difference).mean(1)
                p_value = float(np.mean(np.abs(null) >= abs(value) - _TOLERANCE))
            else:
                null_imagined = imagined_rates[permutations].reshape(len(permutations), -1)
                null = _score(statistic, np.broadcast_to(real_rates.ravel(), null_imagined.shape), null_imagined)
                extreme = null >= value - _TOLERANCE if better == "higher" else null <= value + _TOLERANCE
                p_value = float(np.mean(extreme))
            table[name] = _estimate(value, draws, None if math.isnan(value) else p_value, confidence)
        tables[level] = table
    notes = tuple(_notes(real.mean((1, 2)), imagined.mean((1, 2))))
    return Agreement(tables["policies"], tables["cells"], num_policies, num_tasks, num_episodes, notes)


def _midranks(values: np.ndarray) -> np.ndarray:
    """Rank along the last axis; equal values share the mean of their ranks."""
    below = values[..., None, :] < values[..., :, None]
    equal = values[..., None, :] == values[..., :, None]
    return below.sum(-1) + (equal.sum(-1) + 1) / 2


def _resample(
    real: np.ndarray, imagined: np.ndarray, rng: np.random.Generator, num_resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw policies and, in each, episodes: two (R, P, T) arrays of success counts."""
    num_policies, num_tasks, num_episodes = real.shape
    both, only_real, only_imagined = (real & imagined).sum(-1), (real & ~imagined).sum(-1), (imagined & ~real).sum(-1)
    counts = np.stack([both, only_real, only_imagined, num_episodes - both - only_real - only_imagined], axis=-1)
    picks = rng.integers(num_policies, size=(num_resamples, num_policies))
    # Resampling E paired episodes with replacement = a multinomial over their four joint outcomes.
    draws = rng.multinomial(num_episodes, (counts / num_episodes)[picks])  # (R, P, T, 4)
    return draws[..., 0] + draws[..., 1], draws[..., 0] + draws[..., 2]


def _score(statistic: Statistic, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """Apply a statistic to the rows of two (R, N) arrays, in chunks that bound the memory of pairwise ones."""
    chunks = range(0, len(real), _CHUNK)
    return np.concatenate([statistic(real=real[i : i + _CHUNK], imagined=imagined[i : i + _CHUNK]) for i in chunks])


def _permutations(num: int, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield all orders of `num` things if there are at most `num_resamples`, else the identity and random ones."""
    if math.factorial(num) <= num_resamples:
        yield from map(np.array, itertools.permutations(range(num)))
        return
    yield np.arange(num)  # the observed order is one of the orders the null allows
    for _ in range(num_resamples):
        yield rng.permutation(num)


def _sign_flips(num: int, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    if 2**num <= num_resamples:
        yield from map(np.array, itertools.product((1.0, -1.0), repeat=num))
        return
    yield np.ones(num)
    for _ in range(num_resamples):
        yield rng.choice((1.0, -1.0), size=num)


def _estimate(value: float, draws: np.ndarray, p_value: float | None, confidence: float) -> Estimate:
    draws = draws[~np.isnan(draws)]
    if math.isnan(value) or not len(draws):
        return Estimate(math.nan, math.nan, math.nan, p_value)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    # A statistic at its bound (r = 1, MMRV = 0) can lie outside its percentile interval; a reader expects it inside.
    return Estimate(value, min(float(low), value), max(float(high), value), p_value)


def _notes(real: np.ndarray, imagined: np.ndarray) -> Iterator[str]:
    num_policies = len(real)
    several, constant = num_policies > 1, np.ptp(imagined) == 0
    if num_policies < 5:
        floor = 1 / math.factorial(num_policies)
        yield f"Only {num_policies} policies: no p-value can be below {floor:.2g}, and the intervals are rough."
    if several and constant:
        yield "Imagination gives every policy the same success rate, so it ranks nothing; correlations are undefined."
    if several and np.ptp(real) == 0:
        yield "The reference gives every policy the same success rate, so there is no order to recover."
    upper = np.triu_indices(num_policies, 1)
    tied = (imagined[:, None] == imagined[None, :])[upper] & (real[:, None] != real[None, :])[upper]
    if tied.any() and not constant:
        yield f"{tied.sum()} of {tied.size} pairs of policies tie in imagination but not in the reference."
    num_first = int((imagined == imagined.max()).sum())
    if num_first > 1 and not constant:
        yield f"{num_first} policies tie for first in imagination; top-1 regret is that of the worst of them."


def _check_counts(successes: int, trials: int, confidence: float) -> None:
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in 0..{trials} (the trials), got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
