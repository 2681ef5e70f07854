"""How far the world model's judgement can be trusted: on true videos, and on policies that should fail."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from worldsim.evaluate import EpisodeRecord
from worldsim.leaderboard import IMAGINED, TWIN, confusion, success_rate


def head_on_truth(judged: Sequence[tuple[bool, bool]]) -> dict[str, Any] | None:
    """Return the confusion matrix of (head's verdict, true success) pairs, or None without one."""
    if not judged:
        return None
    verdicts, truths = np.array(judged, dtype=bool).T
    return confusion(predicted=verdicts, truth=truths)


def false_success(records: Sequence[EpisodeRecord], probes: Sequence[str]) -> dict[str, Any]:
    """Return how often imagination calls a success what is none, for each probe policy and for all.

    Args:
        records: episodes of the probes, imagined and, if there is a twin, true. Without twin no probe is taken to
            succeed.
        probes: their names.

    Returns:
        name (and "all") -> false success rate with its Wilson interval, over the episodes that truly fail.
    """
    true_success = {(r.policy, r.task, *r.pair): r.success for r in records if r.world == TWIN}
    card: dict[str, Any] = {}
    verdicts: list[bool] = []
    for probe in probes:
        own = [
            record.success
            for record in records
            if record.world == IMAGINED
            and record.policy == probe
            and not true_success.get((record.policy, record.task, *record.pair), False)
        ]
        card[probe] = success_rate(sum(own), len(own))
        verdicts += own
    card["all"] = success_rate(sum(verdicts), len(verdicts))
    return card
