"""Successful demonstrations of a clip cache, with the labels that hindsight gives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from policies.bc import WAYPOINT_OF_AGENT_POS
from wfm_core.data.actions import to_normalised
from wfm_core.data.clip_cache import ClipCache

GRIPPER_EVENT = 1.0
"""A change of the normalised gripper command by more than this (half its range) opens or closes the gripper."""


@dataclass(frozen=True)
class Demonstrations:
    """Chosen episodes of a cache; all (N, ...) arrays have one row a frame of the whole cache.

    Attributes:
        frames: (N, H, W, 3) uint8, a memory map.
        actions: (N, 7) float32, normalised.
        agent_pos: (N, 7) float32.
        waypoint: (N, 4) float32, m and rad: the gripper's x, y, z, yaw when it next opens or closes, or at the end.
        instruction_id: (N,) int64 index into `instructions`.
        instructions: every instruction of the chosen episodes, sorted.
        first: (E,) int64, first frame of each chosen episode.
        last: (E,) int64, its last frame, which has no action.
    """

    frames: np.ndarray
    actions: np.ndarray
    agent_pos: np.ndarray
    waypoint: np.ndarray
    instruction_id: np.ndarray
    instructions: list[str]
    first: np.ndarray
    last: np.ndarray

    def frame_indices(self) -> np.ndarray:
        """Return the int64 indices of all frames that have an action, in order."""
        spans = [np.arange(first, last) for first, last in zip(self.first, self.last, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *spans])

    def chunks(self, indices: np.ndarray, length: int) -> np.ndarray:
        """Return (B, length, 7) normalised actions from each frame on; the end of the episode is followed by holding.

        Args:
            indices: (B,) frames of chosen episodes.
            length: actions of a chunk.
        """
        episode = np.searchsorted(self.first, indices, side="right") - 1
        final = self.last[episode][:, None] - 1
        steps = indices[:, None] + np.arange(length)
        actions = self.actions[np.minimum(steps, final)]
        actions[..., :-1][steps > final] = 0
        return actions

    def split(self, num_demos: int, num_held_out: int, seed: int) -> tuple["Demonstrations", "Demonstrations"]:
        """Draw training and held-out episodes, the same number of each instruction.

        Args:
            num_demos: training episodes per instruction, 0 for all that are not held out. The draw for a smaller number
                is part of the draw for a larger one.
            num_held_out: held-out episodes per instruction, the same whatever `num_demos`.
            seed: of the draw.

        Raises:
            ValueError: an instruction has too few episodes.
        """
        train, held_out = [], []
        ids = self.instruction_id[self.first]
        for which, instruction in enumerate(self.instructions):
            own = np.random.default_rng([seed, which]).permutation(np.flatnonzero(ids == which))
            if len(own) < num_held_out + max(num_demos, 1):
                raise ValueError(
                    f"{instruction!r} needs {max(num_demos, 1)} demonstrations and {num_held_out} held out, "
                    f"the cache has {len(own)}"
                )
            held_out.append(own[:num_held_out])
            rest = own[num_held_out:]
            train.append(rest[:num_demos] if num_demos else rest)
        return self._of(np.concatenate(train)), self._of(np.concatenate(held_out))

    def _of(self, episodes: np.ndarray) -> "Demonstrations":
        episodes = np.sort(episodes)
        return replace(self, first=self.first[episodes], last=self.last[episodes])


def load_demonstrations(cache_dir: Path, behaviours: Sequence[str]) -> Demonstrations:
    """Choose the episodes of a clip cache that show one of `behaviours` (their meta "behaviour") and end in success.

    Raises:
        ValueError: the cache is damaged, has no proprioception, or no such episode.
    """
    cache = ClipCache(cache_dir)
    last = cache.starts + cache.lengths - 1
    succeeded = cache.columns["success"][last].reshape(-1).astype(bool)
    shown = np.array([episode["meta"].get("behaviour") in behaviours for episode in cache.episodes])
    chosen = np.flatnonzero(succeeded & shown & (cache.lengths > 1))
    if not len(chosen):
        found = sorted({str(episode["meta"].get("behaviour")) for episode in cache.episodes})
        raise ValueError(f"{cache_dir} must have successful episodes of {list(behaviours)}, got behaviours {found}")
    agent_pos = cache.columns["agent_pos"]
    if not np.isfinite(agent_pos).all():
        raise ValueError(f"{cache_dir}: cloning needs agent_pos in every frame, got frames without")
    instructions = sorted({cache.episodes[episode]["instruction"] for episode in chosen})
    actions = to_normalised(cache.columns["actions"])
    instruction_id = np.zeros(len(actions), np.int64)
    waypoint = np.zeros((len(actions), len(WAYPOINT_OF_AGENT_POS)), np.float32)
    for episode in chosen:
        span = slice(cache.starts[episode], last[episode] + 1)
        instruction_id[span] = instructions.index(cache.episodes[episode]["instruction"])
        waypoint[span] = waypoints(actions[span], agent_pos[span])
    return Demonstrations(
        frames=cache.frames,
        actions=actions,
        agent_pos=agent_pos,
        waypoint=waypoint,
        instruction_id=instruction_id,
        instructions=instructions,
        first=cache.starts[chosen],
        last=last[chosen],
    )


def waypoints(actions: np.ndarray, agent_pos: np.ndarray) -> np.ndarray:
    """Return where the gripper is at its next event, for every frame of one episode.

    Args:
        actions: (T + 1, 7) normalised; the last row is padding.
        agent_pos: (T + 1, 7).

    Returns:
        (T + 1, 4) x, y, z, yaw of `agent_pos` at the next frame (this one included) whose action opens or closes the
        gripper, or at the last frame.
    """
    steps = np.arange(len(actions))
    event = np.zeros(len(actions), bool)
    event[1:] = np.abs(np.diff(actions[:, -1])) > GRIPPER_EVENT
    event[-1] = True
    at = steps[event]
    return agent_pos[at[np.searchsorted(at, steps)]][:, list(WAYPOINT_OF_AGENT_POS)]
