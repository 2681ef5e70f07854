"""How a row is judged after a step: reward, and whether and why its episode ends; pure functions of both twins."""

from dataclasses import dataclass

import numpy as np

from tasks.task import REWARD_TERMS, REWARD_WEIGHTS, SUCCESS_HOLD_STEPS

_WEIGHTS = np.array([REWARD_WEIGHTS[term] for term in REWARD_TERMS])
_ON_THE_WAY = np.array([0.0 if term == "success" else REWARD_WEIGHTS[term] for term in REWARD_TERMS])
REWARDS = ("terms", "progress")


@dataclass(frozen=True)
class StepResult:
    """What one control step of B rows gave, besides the observation.

    Attributes:
        reward_terms: (B, 4) float in [0, 1], in the order of `tasks.task.REWARD_TERMS`.
        success: (B,) bool, the success test at this moment.
        failure: (B,) bool, the episode can no longer succeed.
        uncertainty: (B,) float >= 0, zeros where the env is exact; NaN counts as above every limit.
    """

    reward_terms: np.ndarray
    success: np.ndarray
    failure: np.ndarray
    uncertainty: np.ndarray


@dataclass(frozen=True)
class Rules:
    """What decides about a row besides what the step gave.

    Attributes:
        max_episode_steps: control steps until truncation.
        uncertainty_limit: a row whose uncertainty is above it is truncated.
        uncertainty_penalty: reward that a unit of uncertainty costs in every step.
        reward: "terms", the weighted sum of the reward terms; or "progress", by how much the sum of all but success has
            grown in this step, and the weight of success once, when it has held: who is paid by the step for being
            close to success would be right to stay there.

    Raises:
        ValueError: max_episode_steps below 1, a limit or a penalty below 0 or NaN, or an unknown reward.
    """

    max_episode_steps: int
    uncertainty_limit: float = np.inf
    uncertainty_penalty: float = 0.0
    reward: str = REWARDS[0]

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {REWARDS}, got {self.reward!r}")
        if self.max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {self.max_episode_steps}")
        if not self.uncertainty_limit >= 0:  # NaN is not
            raise ValueError(f"uncertainty_limit must be at least 0 (inf: no limit), got {self.uncertainty_limit}")
        if not 0 <= self.uncertainty_penalty < np.inf:
            raise ValueError(f"uncertainty_penalty must be finite and at least 0, got {self.uncertainty_penalty}")


@dataclass(frozen=True)
class Judgement:
    """What a step means for B rows.

    Attributes:
        reward: (B,) float64.
        held: (B,) int64, steps in a row, this one included, in which the success test held.
        potential: (B,) float64, weighted sum of the reward terms but success.
        solved: (B,) bool, it held long enough.
        terminated: (B,) bool, by success or failure.
        truncated: (B,) bool, by the horizon or uncertainty.
        end_reason: (B,) object, "success", "failure", "uncertainty", "horizon", or "" while the row runs.
    """

    reward: np.ndarray
    held: np.ndarray
    potential: np.ndarray
    solved: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    end_reason: np.ndarray


def judge(result: StepResult, elapsed: np.ndarray, held: np.ndarray, potential: np.ndarray, rules: Rules) -> Judgement:
    """Judge B rows.

    Args:
        result: what the step gave.
        elapsed: (B,) int64, steps since the row began, this one included.
        held: (B,) int64, of the judgement before; zeros at first.
        potential: (B,) float64, of the judgement before; at first it means nothing and no progress is seen.
        rules: limits and prices.
    """
    held = np.where(result.success, held + 1, 0)
    solved = held >= SUCCESS_HOLD_STEPS
    failed = result.failure & ~solved
    uncertain = ~(result.uncertainty <= rules.uncertainty_limit)  # NaN is above every limit
    late = elapsed >= rules.max_episode_steps
    terminated = solved | failed
    reason = np.full(len(held), "", dtype=object)
    for name, rows in (("horizon", late), ("uncertainty", uncertain), ("failure", failed), ("success", solved)):
        reason[rows] = name  # the later name wins
    terms = result.reward_terms.astype(np.float64)
    after = terms @ _ON_THE_WAY
    if rules.reward == "terms":
        reward = terms @ _WEIGHTS
    else:
        reward = np.where(elapsed > 1, after - potential, 0.0) + REWARD_WEIGHTS["success"] * solved
    if rules.uncertainty_penalty:
        reward = reward - rules.uncertainty_penalty * np.nan_to_num(result.uncertainty)
    return Judgement(reward, held, after, solved, terminated, (uncertain | late) & ~terminated, reason)
