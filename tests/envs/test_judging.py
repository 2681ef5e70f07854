import numpy as np
import pytest

from envs.judging import Rules, StepResult, judge
from tasks.task import REWARD_TERMS, REWARD_WEIGHTS, SUCCESS_HOLD_STEPS


def result(terms, success=False, failure=False, uncertainty=0.0) -> StepResult:
    return StepResult(np.array([terms]), np.array([success]), np.array([failure]), np.array([uncertainty]))


def rolled(results, rules: Rules) -> list:
    """Judge one row's steps; the last of what comes back is where it ended."""
    held, potential, found = np.zeros(1, np.int64), np.zeros(1), []
    for elapsed, each in enumerate(results, start=1):
        found.append(judge(each, np.array([elapsed]), held, potential, rules))
        held, potential = found[-1].held, found[-1].potential
    return found


def test_terms_are_paid_in_every_step():
    found = rolled([result([0.5, 1.0, 0.0, 0.0]), result([0.5, 1.0, 0.0, 1.0])], Rules(10))
    assert [each.reward[0] for each in found] == pytest.approx([0.25, 1.25])


def test_progress_is_paid_once_and_success_when_it_has_held():
    near, far = [1.0, 0.5, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]
    there = [1.0, 1.0, 1.0, 1.0]
    steps = [result(far), result(near), result(near), result(far), result(near)]
    found = rolled(steps + [result(there, success=True)] * SUCCESS_HOLD_STEPS, Rules(20, reward="progress"))
    rewards = [each.reward[0] for each in found]
    assert rewards[:5] == pytest.approx([0.0, 0.15, 0.0, -0.15, 0.15])
    weights = [REWARD_WEIGHTS[term] for term in REWARD_TERMS[:3]]
    assert rewards[5:] == pytest.approx([sum(weights) - 0.2, *[0.0] * (SUCCESS_HOLD_STEPS - 2), 1.0])
    assert sum(rewards) == pytest.approx(1.0 + sum(weights) - 0.05)  # whatever the way, all but what the first step saw


def test_uncertainty_costs_and_ends():
    rules = Rules(10, uncertainty_limit=0.5, uncertainty_penalty=2.0)
    sure, unsure, lost = (judge(result([0] * 4, uncertainty=u), *np.ones((3, 1)), rules) for u in (0.1, 0.6, np.nan))
    assert sure.reward[0] == pytest.approx(-0.2) and not sure.truncated[0] and sure.end_reason[0] == ""
    assert unsure.reward[0] == pytest.approx(-1.2) and unsure.truncated[0] and unsure.end_reason[0] == "uncertainty"
    assert np.isfinite(lost.reward[0]) and lost.truncated[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
        ({"uncertainty_limit": np.nan}, "uncertainty_limit must be at least 0"),
        ({"uncertainty_penalty": -1.0}, "uncertainty_penalty must be finite and at least 0, got -1.0"),
        ({"reward": "sum"}, "reward must be one of .*, got 'sum'"),
    ],
)
def test_impossible_rules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Rules(**{"max_episode_steps": 5} | settings)
