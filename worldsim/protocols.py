"""What worldsim asks of a policy (the consumer owns the protocol)."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

Obs = Mapping[str, np.ndarray]
"""Batched observation: "pixels" (B, H, W, 3) uint8 and "agent_pos" (B, 7) float32."""


class Policy(Protocol):
    """Anything that acts, for a batch of rows that run one task."""

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes.

        Args:
            num_envs: number of rows B; constant until the next call without a mask.
            instruction: the language instruction, one for all rows.
            seeds: B seeds; a row's actions depend on its own seed and observations only.
            mask: (B,) bool, restart only these rows and leave the others as they are; None restarts all.
        """
        ...

    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1] for the current observation."""
        ...
