import math

import numpy as np
import pytest

from worldsim.uncertainty import episode_limit, separation


def test_the_limit_is_the_conformal_quantile_of_the_episodes_largest_values():
    episodes = [np.array([0.0, k / 10]) for k in range(19)]  # largest values 0.0 .. 1.8
    assert episode_limit(episodes, 0.10) == pytest.approx(1.7)  # rank ceil(20 * 0.9) = 18 of 19
    assert episode_limit(episodes, 0.05) == pytest.approx(1.8)
    assert episode_limit(episodes, 0.04) == math.inf  # 19 episodes cannot promise one in 25


def test_new_ordinary_episodes_exceed_it_as_rarely_as_promised():
    random = np.random.default_rng(0)
    alarms = []
    for _ in range(400):
        limit = episode_limit(list(random.exponential(size=(40, 6))), 0.1)
        alarms.append((random.exponential(size=(50, 6)).max(axis=1) > limit).mean())
    assert 0.08 < np.mean(alarms) <= 0.105  # the exact expectation is 4 / 41


def test_separation_counts_pairs():
    ordinary, strange = np.array([1.0, 2.0, 3.0]), np.array([2.0, 5.0])
    assert separation(ordinary, strange) == pytest.approx((1 + 0.5 + 3) / 6)
    assert separation(strange, ordinary) == pytest.approx(1 - (1 + 0.5 + 3) / 6)


def test_senseless_input_is_refused():
    with pytest.raises(ValueError, match=r"\(0, 1\), got 1.5"):
        episode_limit([np.ones(2)], 1.5)
    with pytest.raises(ValueError, match="at least one episode"):
        episode_limit([np.ones(2), np.ones(0)], 0.1)
    with pytest.raises(ValueError, match="finite, got nan"):
        episode_limit([np.array([np.nan, 1.0])], 0.1)
    with pytest.raises(ValueError, match="0 ordinary"):
        separation(np.zeros(0), np.ones(1))
