"""From the model's own uncertainty to a limit that means something: at most so many false alarms an episode."""

import math
from collections.abc import Sequence

import numpy as np


def episode_limit(uncertainties: Sequence[np.ndarray], false_alarm_rate: float) -> float:
    """Choose the limit that a fraction `false_alarm_rate` of ordinary episodes is expected to exceed at least once.

    Split conformal prediction on the episodes' largest values: for a new episode exchangeable with the given ones,
    P(largest uncertainty > limit) <= false_alarm_rate.

    Args:
        uncertainties: one array (T,) of per-step uncertainties an episode; lengths may differ.
        false_alarm_rate: in (0, 1).

    Returns:
        The limit; infinity where there are too few episodes to promise the rate.

    Raises:
        ValueError: no episode, an empty one, a value that is not finite, or a rate outside (0, 1).

    Source: Vovk et al., Algorithmic Learning in a Random World (2005), split conformal quantile.
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}")
    if not uncertainties or any(len(values) == 0 for values in uncertainties):
        raise ValueError("uncertainties must hold at least one episode of at least one step, got an empty one")
    largest = np.sort([np.max(values) for values in uncertainties])
    if not np.isfinite(largest).all():
        raise ValueError(f"uncertainties must be finite, got {largest[~np.isfinite(largest)][0]}")
    rank = math.ceil((len(largest) + 1) * (1 - false_alarm_rate))
    return float(largest[rank - 1]) if rank <= len(largest) else math.inf


def separation(ordinary: np.ndarray, strange: np.ndarray) -> float:
    """Return the probability that a strange case is more uncertain than an ordinary one (area under the ROC curve).

    Args:
        ordinary: (N,) uncertainties where the model should be sure.
        strange: (M,) uncertainties where it should not.

    Returns:
        In [0, 1]; 0.5 means the uncertainty says nothing. Ties count half.

    Raises:
        ValueError: one of them is empty.
    """
    if not len(ordinary) or not len(strange):
        raise ValueError(f"both groups must have a member, got {len(ordinary)} ordinary and {len(strange)} strange")
    ordered = np.sort(ordinary)
    below = np.searchsorted(ordered, strange, side="left")
    not_above = np.searchsorted(ordered, strange, side="right")
    return float((below + not_above).mean() / (2 * len(ordered)))
