"""What callers may pass to reset and step: pure functions that check it and fill it up to B rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wfm_core.data.actions import ACTION_DIM, to_physical

_CLIP_TOLERANCE = 1e-6  # float32 round-off of an action on the border is no clip


def checked_reset_mask(mask: np.ndarray | None, num_envs: int) -> np.ndarray:
    """Return `options["reset_mask"]`, all rows if None.

    Raises:
        TypeError: the mask is no numpy array of bools.
        ValueError: it has another shape than (B,) or no True entry.
    """
    if mask is None:
        return np.ones(num_envs, bool)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        got = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"options['reset_mask'] must be a numpy array of dtype bool, got {got}")
    if mask.shape != (num_envs,) or not mask.any():
        raise ValueError(f"options['reset_mask'] must have shape ({num_envs},) and a True entry, got {mask.tolist()}")
    return mask.copy()


def checked_seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """Return one seed a row: none, seed + row for an int, or the given list.

    Raises:
        ValueError: the list has another length than B.
    """
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, int | np.integer):
        return [int(seed) + row for row in range(num_envs)]
    if len(seed) != num_envs:
        raise ValueError(f"seed must have one entry for each of {num_envs} rows, got {len(seed)}")
    return [None if entry is None else int(entry) for entry in seed]


def checked_initial_states(initial_state: Any, mask: np.ndarray, num_states: int) -> np.ndarray | None:
    """Return `options["initial_state"]` (an int or B ints) as (B,) int64, or None.

    Raises:
        ValueError: not an int or B ints, or an entry of a row in `mask` outside 0 .. num_states - 1.
    """
    if initial_state is None:
        return None
    states = np.asarray(initial_state)
    if states.shape not in ((), mask.shape) or not np.issubdtype(states.dtype, np.integer):
        raise ValueError(f"initial_state must be an int or {len(mask)} ints, got {initial_state!r}")
    states = np.broadcast_to(states, mask.shape).astype(np.int64)
    bad = states[mask & ((states < 0) | (states >= num_states))]
    if bad.size:
        raise ValueError(f"initial_state must be in 0 .. {num_states - 1}, got {int(bad[0])}")
    return states


def checked_actions(actions: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip actions to [-1, 1] and convert them.

    Args:
        actions: (B, 7) as the agent gave them.
        active: (B,) bool; the other rows' actions are ignored and become zeros in [-1, 1].

    Returns:
        (B, 7) float32 physical actions and (B,) int64, how many components were clipped.

    Raises:
        ValueError: another shape, or an active row that is not finite.
    """
    actions = np.asarray(actions)
    if actions.shape != (len(active), ACTION_DIM):
        raise ValueError(f"actions must have shape ({len(active)}, {ACTION_DIM}), got {actions.shape}")
    bad = np.flatnonzero(active & ~np.isfinite(actions).all(axis=1))
    if bad.size:
        raise ValueError(f"actions must be finite, got {actions[bad[0]].tolist()} in row {bad[0]}")
    actions = np.where(active[:, None], actions, 0.0)
    clipped = (np.abs(actions) > 1 + _CLIP_TOLERANCE).sum(axis=1)
    return to_physical(np.clip(actions, -1.0, 1.0)), clipped
