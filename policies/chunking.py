"""From action chunks to one action a step: the wrapper every chunk-predicting policy runs in."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wfm_core.data.actions import ACTION_DIM
from worldsim.protocols import Obs


class ChunkPredictor(Protocol):
    """A stateless map from observations to action chunks; row i of the result depends on row i of `obs` only."""

    chunk_len: int

    def predict(self, obs: Obs, instruction: str) -> np.ndarray:
        """Return the next actions, (B, chunk_len, 7) float32 in [-1, 1]."""
        ...


class ChunkedPolicy:
    """Execute the first `num_executed` actions of each chunk, or blend all chunks that cover a step.

    Every row has its own cursor, so rows that were reset re-plan while the others finish their chunks; only rows that
    need a new chunk are passed to the predictor.

    Args:
        predictor: predicts the chunks.
        num_executed: actions executed of each chunk before the next is predicted, 1 to `predictor.chunk_len`.
        ensemble_decay: None executes chunks as they are. A number turns on temporal ensembling: a chunk is predicted
            every step and the action is the mean of all predictions for this step, weighted exp(-decay * i) where
            i = 0 is the oldest; `num_executed` must then be 1. Source: Zhao et al. 2023 (ACT), algorithm 2.

    Raises:
        ValueError: `num_executed` is outside its range, or not 1 with ensembling.
    """

    def __init__(self, predictor: ChunkPredictor, num_executed: int, ensemble_decay: float | None = None) -> None:
        if not 1 <= num_executed <= predictor.chunk_len:
            raise ValueError(f"num_executed must be in 1..{predictor.chunk_len} (the chunk length), got {num_executed}")
        if ensemble_decay is not None and num_executed != 1:
            raise ValueError(f"temporal ensembling needs num_executed = 1, got {num_executed}")
        self.predictor = predictor
        self.num_executed = num_executed
        self.ensemble_decay = ensemble_decay
        self._instruction: str | None = None
        self._chunks = np.zeros((0, 0, predictor.chunk_len, ACTION_DIM), np.float32)  # (B, age, H, 7), newest first
        self._age = np.zeros(0, np.int64)  # (B,) steps since the newest chunk was predicted
        self._num_chunks = np.zeros(0, np.int64)  # (B,) chunks of this episode still in the buffer

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`.

        Raises:
            ValueError: `seeds` or `mask` do not have `num_envs` entries, or a masked reset changes `num_envs` or the
                instruction.
        """
        if len(seeds) != num_envs:
            raise ValueError(f"reset needs one seed a row ({num_envs}), got {len(seeds)}")
        if mask is None:
            length = self.predictor.chunk_len
            kept = length if self.ensemble_decay is not None else 1
            self._instruction = instruction
            self._chunks = np.zeros((num_envs, kept, length, ACTION_DIM), np.float32)
            self._age = np.full(num_envs, self.num_executed)
            self._num_chunks = np.zeros(num_envs, np.int64)
            return
        mask = np.asarray(mask, bool)
        if mask.shape != (num_envs,):
            raise ValueError(f"mask must have shape ({num_envs},), got {mask.shape}")
        if num_envs != len(self._age) or instruction != self._instruction:
            raise ValueError(
                f"a masked reset must keep num_envs = {len(self._age)} and the instruction {self._instruction!r}, "
                f"got {num_envs} and {instruction!r}"
            )
        self._age[mask] = self.num_executed
        self._num_chunks[mask] = 0

    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1].

        Raises:
            ValueError: before the first `reset`, or when the observations do not have one row an env.
        """
        if self._instruction is None:
            raise ValueError("reset must be called before act")
        if len(obs["agent_pos"]) != len(self._age):
            raise ValueError(f"obs must have {len(self._age)} rows (num_envs of reset), got {len(obs['agent_pos'])}")
        rows = np.flatnonzero(self._age >= self.num_executed)
        if len(rows):
            chunk = self.predictor.predict({key: value[rows] for key, value in obs.items()}, self._instruction)
            self._chunks[rows] = np.roll(self._chunks[rows], 1, axis=1)
            self._chunks[rows, 0] = chunk
            self._num_chunks[rows] = np.minimum(self._num_chunks[rows] + 1, self._chunks.shape[1])
            self._age[rows] = 0
        if self.ensemble_decay is None:
            action = self._chunks[np.arange(len(self._age)), 0, self._age]
        else:
            action = self._blend(self.ensemble_decay)
        self._age += 1
        return np.clip(action, -1, 1).astype(np.float32)

    def _blend(self, decay: float) -> np.ndarray:
        ages = np.arange(self._chunks.shape[1])  # chunk j was predicted j steps ago and holds this step at index j
        predictions = self._chunks[:, ages, ages]  # (B, age, 7)
        from_oldest = self._num_chunks[:, None] - 1 - ages  # (B, age)
        weights = np.where(from_oldest >= 0, np.exp(-decay * np.maximum(from_oldest, 0)), 0.0)
        return np.einsum("ba,bad->bd", weights / weights.sum(axis=1, keepdims=True), predictions)
