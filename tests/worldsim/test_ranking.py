import itertools
import math

import numpy as np
import pytest
from scipy import stats

from worldsim import ranking
from worldsim.ranking import agreement, clopper_pearson_interval, paired_difference, wilson_interval


def outcomes(rates, num_tasks=2, num_episodes=20, seed=None):
    """(P, T, E) bool with the given success rate per policy: exactly (seed None) or by chance."""
    rates = np.asarray(rates)[:, None, None]
    if seed is None:
        return np.broadcast_to(
            np.arange(num_episodes) < np.round(rates * num_episodes), (len(rates), num_tasks, num_episodes)
        )
    return np.random.default_rng(seed).random((len(rates), num_tasks, num_episodes)) < rates


# Closed-form values, worked by hand: z = 1.959964, z^2 = 3.841459.
@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [
        (0, 10, (0.0, 3.841459 / 13.841459)),
        (10, 10, (10 / 13.841459, 1.0)),
        (5, 10, (0.236593, 0.763407)),
        (0, 0, (0, 1)),
    ],
)
def test_wilson_equals_its_closed_form(successes, trials, expected):
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(0, 24), (1, 24), (13, 24), (24, 24)])
def test_intervals_equal_scipy(successes, trials):
    for function, method in [(wilson_interval, "wilson"), (clopper_pearson_interval, "exact")]:
        expected = stats.binomtest(successes, trials).proportion_ci(0.9, method=method)
        assert function(successes, trials, 0.9) == pytest.approx(tuple(expected), abs=1e-9)


def test_clopper_pearson_covers_at_least_its_level():
    trials, rate = 24, 0.3
    covered = [low <= rate <= high for low, high in (clopper_pearson_interval(k, trials) for k in range(trials + 1))]
    assert (stats.binom.pmf(np.arange(trials + 1), trials, rate) * covered).sum() >= 0.95


@pytest.mark.parametrize("arguments", [(5, 4), (-1, 4), (1, 4, 1.0)])
def test_interval_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="must be in"):
        wilson_interval(*arguments)


def test_correlations_equal_scipy_with_ties():
    rng = np.random.default_rng(0)
    real, imagined = rng.integers(0, 5, (6, 9)) / 5, rng.integers(0, 5, (6, 9)) / 5
    for name, reference in [("pearson", stats.pearsonr), ("spearman", stats.spearmanr), ("kendall", stats.kendalltau)]:
        values = getattr(ranking, name)(real=real, imagined=imagined)
        assert values == pytest.approx([reference(x, y).statistic for x, y in zip(imagined, real, strict=True)])


def test_mmrv_values_and_asymmetry():
    def mmrv(real, imagined):
        return float(ranking.mmrv(real=np.array(real), imagined=np.array(imagined)))

    assert mmrv([0.2, 0.5, 0.8], [0.1, 0.2, 0.3]) == 0
    # A tie in imagination costs the full gap for one of the two policies; read the other way round it costs nothing.
    assert mmrv(real=[0.2, 0.8], imagined=[0.5, 0.5]) == pytest.approx(0.3)
    assert mmrv(real=[0.5, 0.5], imagined=[0.2, 0.8]) == 0
    # A constant predictor: gaps of .8 (policy at .1), .7 (policy at .2), none for the best.
    assert mmrv(real=[0.1, 0.2, 0.9], imagined=[0.5, 0.5, 0.5]) == pytest.approx((0.8 + 0.7) / 3)
    # Full reversal: every policy's largest gap.
    assert mmrv(real=[0.0, 0.5, 1.0], imagined=[1.0, 0.5, 0.0]) == pytest.approx((1 + 0.5 + 1) / 3)


def test_mmrv_follows_its_definition_literally():
    rng = np.random.default_rng(1)
    for _ in range(20):
        real, imagined = rng.integers(0, 4, 6) / 4, rng.integers(0, 4, 6) / 4
        pairs = itertools.product(range(6), repeat=2)
        cost = np.zeros((6, 6))
        for i, j in pairs:
            cost[i, j] = abs(real[i] - real[j]) * ((imagined[i] < imagined[j]) != (real[i] < real[j]))
        assert ranking.mmrv(real=real, imagined=imagined) == pytest.approx(cost.max(1).mean())


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        ranking.mmrv(np.zeros(2), np.zeros(2))  # ty: ignore
    with pytest.raises(TypeError):
        agreement(np.zeros((2, 1, 1)), np.zeros((2, 1, 1)), rng=np.random.default_rng(0))  # ty: ignore


def test_top1_regret_takes_the_worst_of_a_tie():
    real = np.array([0.9, 0.7, 0.2])
    assert ranking.top1_regret(real=real, imagined=np.array([0.5, 0.6, 0.1])) == pytest.approx(0.2)
    assert ranking.top1_regret(real=real, imagined=np.array([0.6, 0.6, 0.1])) == pytest.approx(0.2)
    assert ranking.top1_regret(real=real, imagined=np.array([0.5, 0.5, 0.5])) == pytest.approx(0.7)


def test_bias_is_signed_imagined_minus_real():
    real, imagined = np.array([0.2, 0.6]), np.array([0.5, 0.5])
    assert ranking.bias(real=real, imagined=imagined) == pytest.approx(0.1)
    assert ranking.mean_absolute_error(real=real, imagined=imagined) == pytest.approx(0.2)


def test_agreement_recovers_a_constructed_order():
    rates = [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    result = agreement(
        real=outcomes(rates, num_episodes=200),
        imagined=outcomes([r * 0.5 for r in rates], num_episodes=200),
        rng=np.random.default_rng(0),
        num_resamples=800,
    )
    assert [
        result.policies[name].value for name in ("pearson", "spearman", "kendall", "mmrv", "top1_regret")
    ] == pytest.approx([1, 1, 1, 0, 0])
    assert result.policies["bias"].value == pytest.approx(-np.mean(rates) / 2)
    assert result.policies["bias"].high < 0
    # All 6! orders are enumerated and only the true one reaches rho = 1.
    assert result.policies["spearman"].p_value == pytest.approx(1 / math.factorial(6))
    # The sign test: all six differences are negative, 2 of 2^6 sign patterns are as extreme.
    assert result.policies["bias"].p_value == pytest.approx(2 / 2**6)
    assert result.policies["pearson"].low > 0.9
    assert result.notes == ()


def test_agreement_of_a_reversed_order():
    result = agreement(
        real=outcomes([0.1, 0.5, 0.9]),
        imagined=outcomes([0.9, 0.5, 0.1]),
        rng=np.random.default_rng(0),
        num_resamples=200,
    )
    assert result.policies["pearson"].value == pytest.approx(-1)
    assert result.policies["pearson"].p_value == 1
    assert result.policies["top1_regret"].value == pytest.approx(0.8)
    assert "Only 3 policies" in result.notes[0]


def test_easy_and_hard_tasks_are_no_evidence_for_the_policies():
    # Both worlds agree perfectly on the tasks and hold nothing about the policies: cells correlate, but p stays large.
    rng = np.random.default_rng(3)
    task_rates = np.array([0.05, 0.35, 0.65, 0.95])[None, :, None]
    real, imagined = (rng.random((6, 4, 24)) < task_rates for _ in range(2))
    result = agreement(real=real, imagined=imagined, rng=rng, num_resamples=800)
    assert result.cells["pearson"].value > 0.9
    assert result.cells["pearson"].p_value > 0.05


def test_constant_predictor_and_ties_are_reported():
    rng = np.random.default_rng(0)
    constant = agreement(real=outcomes([0.1, 0.5, 0.9] * 2), imagined=outcomes([0.5] * 6), rng=rng, num_resamples=100)
    assert math.isnan(constant.policies["pearson"].value)
    assert constant.policies["pearson"].p_value is None
    assert any("same success rate" in note for note in constant.notes)
    ties = agreement(
        real=outcomes([0.1, 0.3, 0.5, 0.7, 0.9]),
        imagined=outcomes([0.1, 0.3, 0.5, 0.8, 0.8]),
        rng=rng,
        num_resamples=100,
    )
    assert ties.notes == (
        "1 of 10 pairs of policies tie in imagination but not in the reference.",
        "2 policies tie for first in imagination; top-1 regret is that of the worst of them.",
    )


def test_interval_widens_with_fewer_episodes_and_covers_the_truth():
    rates = np.linspace(0.1, 0.9, 8)
    widths = []
    for num_episodes in (6, 96):
        real = outcomes(rates, num_episodes=num_episodes, seed=1)
        imagined = outcomes(rates, num_episodes=num_episodes, seed=2)
        estimate = agreement(real=real, imagined=imagined, rng=np.random.default_rng(0), num_resamples=500).policies[
            "pearson"
        ]
        assert estimate.low <= estimate.value <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert widths[0] > 2 * widths[1]


def test_same_generator_same_agreement():
    arguments = {
        "real": outcomes([0.2, 0.4, 0.9], seed=0),
        "imagined": outcomes([0.2, 0.5, 0.8], seed=1),
        "num_resamples": 50,
    }
    first, second = (agreement(rng=np.random.default_rng(5), **arguments) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 5)), ((2, 3), (2, 3)), ((0, 1, 1), (0, 1, 1))])
def test_agreement_refuses_unpaired_outcomes(shapes):
    with pytest.raises(ValueError, match=r"\(P, T, E\)"):
        agreement(real=np.zeros(shapes[0]), imagined=np.zeros(shapes[1]), rng=np.random.default_rng(0))


def test_paired_difference_uses_the_pairing():
    # Rates .6 and .5 in both cases: outcomes that move together pin the difference down, independent ones do not.
    a = np.arange(40)[None] < 24
    together, apart = np.arange(40)[None] < 20, (np.arange(40)[None] % 2) == 0
    rng = np.random.default_rng(0)
    tight, loose = (paired_difference(a, b, rng=rng) for b in (together, apart))
    assert tight.value == loose.value == pytest.approx(0.1)
    assert tight.high - tight.low < 0.6 * (loose.high - loose.low)
    assert tight.p_value == pytest.approx(2 / 2**4)  # McNemar: four wins, no loss


def test_paired_difference_of_equal_policies_has_width():
    same = np.ones((2, 24), dtype=bool)
    estimate = paired_difference(same, same, rng=np.random.default_rng(0))
    assert estimate.value == 0
    assert estimate.low < 0 < estimate.high
    assert estimate.p_value == 1


def test_paired_difference_interval_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        shared = rng.random((2, 24))
        a, b = shared < 0.7, np.where(rng.random((2, 24)) < 0.5, shared, rng.random((2, 24))) < 0.5
        estimate = paired_difference(a, b, rng=rng, num_resamples=400)
        hits += estimate.low <= 0.2 <= estimate.high
    assert hits >= 180


def test_paired_difference_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"one shape \(T, E\)"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 2)), rng=np.random.default_rng(0))
