"""Policies that should fail: what imagination calls a success of theirs measures how easily it is fooled."""

from collections.abc import Callable, Sequence

import numpy as np

from wfm_core.data.actions import ACTION_DIM, hold_action, to_normalised
from worldsim.protocols import Obs, Policy


class NoOpPolicy:
    """Keep still, with the gripper open."""

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`."""
        self._action = np.tile(to_normalised(hold_action(1.0)), (num_envs, 1))

    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions."""
        return self._action.copy()


class RandomPolicy:
    """Draw every action uniformly from the whole box."""

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`."""
        self._generators = _restarted(None if mask is None else self._generators, seeds, mask)

    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1]."""
        return np.stack([rng.uniform(-1, 1, ACTION_DIM) for rng in self._generators]).astype(np.float32)


class ShuffledPolicy:
    """Another policy's actions in a random order in time: the right motions, at the wrong moments.

    At every step the policy acts on what it sees, its action joins the row's pool, and one is drawn from the pool and
    removed once the pool holds `pool_size`.
    """

    def __init__(self, policy: Policy, pool_size: int = 20) -> None:
        """Wrap a policy.

        Raises:
            ValueError: a pool of fewer than 2.
        """
        if pool_size < 2:
            raise ValueError(f"pool_size must be at least 2, got {pool_size}")
        self._policy, self._pool_size = policy, pool_size

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`."""
        self._policy.reset(num_envs, instruction=instruction, seeds=seeds, mask=mask)
        self._generators = _restarted(None if mask is None else self._generators, seeds, mask)
        if mask is None:
            self._pools: list[list[np.ndarray]] = [[] for _ in range(num_envs)]
        else:
            for row in np.flatnonzero(mask):
                self._pools[row] = []

    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1]."""
        actions = np.array(self._policy.act(obs), dtype=np.float32)
        for row, (pool, rng) in enumerate(zip(self._pools, self._generators, strict=True)):
            pool.append(actions[row].copy())
            chosen = int(rng.integers(len(pool)))
            actions[row] = pool[chosen]
            if len(pool) == self._pool_size:
                pool.pop(chosen)
        return actions


PROBES: dict[str, Callable[[Policy], Policy]] = {
    "no-op": lambda policy: NoOpPolicy(),
    "random": lambda policy: RandomPolicy(),
    "shuffled": ShuffledPolicy,
}
"""Probe name -> how to make it from a policy (the one whose actions are shuffled)."""


def _restarted(
    generators: list[np.random.Generator] | None, seeds: Sequence[int], mask: np.ndarray | None
) -> list[np.random.Generator]:
    if generators is None or mask is None:
        return [np.random.default_rng(seed) for seed in seeds]
    return [
        np.random.default_rng(seed) if restart else rng
        for rng, seed, restart in zip(generators, seeds, mask, strict=True)
    ]
