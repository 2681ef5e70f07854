"""Successful demonstrations of a clip cache, with the labels that hindsight gives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from policies.actor import WAYPOINT_OF_AGENT_POS
from wfm_core.data.actions import to_normalised
from wfm_core.data.clip_cache import ClipCache

GRIPPER_EVENT = 1.0
"""A change of the normalised gripper command by more than this (half its range) opens or closes the gripper."""


@dataclass(frozen=True)
class Demonstrations:
    """Chosen episodes of one or more caches; all (N, ...) arrays have one row a frame of the whole caches, end to end.

    Attributes:
        caches: where they are.
        actions: (N, 7) float32, normalised.
        agent_pos: (N, 7) float32.
        waypoint: (N, 4) float32, m and rad: the gripper's x, y, z, yaw when it next opens or closes, or at the end.
        instruction_id: (N,) int64 index into `instructions`.
        instructions: every instruction of the chosen episodes, sorted.
        first: (E,) int64, first frame of each chosen episode.
        last: (E,) int64, its last frame, which has no action.
    """

    caches: tuple[ClipCache, ...]
    actions: np.ndarray
    agent_pos: np.ndarray
    waypoint: np.ndarray
    instruction_id: np.ndarray
    instructions: list[str]
    first: np.ndarray
    last: np.ndarray

    @property
    def image_size(self) -> int:
        """Height and width of a frame."""
        return self.caches[0].frames.shape[1]

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """Return a copy of the frames (B, H, W, 3) uint8 at the given indices (B,)."""
        return self.rows([cache.frames for cache in self.caches], indices)

    def rows(self, arrays: Sequence[np.ndarray], indices: np.ndarray) -> np.ndarray:
        """Return a copy of rows (B, ...) of arrays that have a row for each frame of each cache."""
        ends = np.cumsum([len(array) for array in arrays])
        which = np.searchsorted(ends, indices, side="right")
        out = np.empty((len(indices), *arrays[0].shape[1:]), arrays[0].dtype)
        for i, array in enumerate(arrays):
            mine = which == i
            out[mine] = array[indices[mine] - (ends[i] - len(array))]
        return out

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
        return chunks_of(self.actions, indices, length, self.last[episode] - 1)

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


def load_demonstrations(cache_dirs: Sequence[Path | str], behaviours: Sequence[str]) -> Demonstrations:
    """Choose the episodes of clip caches that show one of `behaviours` (their meta "behaviour") and end in success.

    Raises:
        ValueError: a cache is damaged or has no proprioception, frames differ in size, or there is no such episode.
    """
    caches = [ClipCache(path) for path in cache_dirs]
    for cache in caches:
        if "success" not in cache.columns:
            raise ValueError(f"{cache.directory}: demonstrations are chosen by the label success, which it lacks")
    episodes = [episode for cache in caches for episode in cache.episodes]
    shown = np.array([episode["meta"].get("behaviour") in behaviours for episode in episodes], bool)
    lengths = np.concatenate([np.zeros(0, np.int64), *(cache.lengths for cache in caches)])
    starts = np.cumsum(lengths) - lengths
    last = starts + lengths - 1
    actions, agent_pos, succeeded = (
        np.concatenate([cache.columns[name] for cache in caches]) for name in ("actions", "agent_pos", "success")
    )
    chosen = np.flatnonzero(succeeded.reshape(-1)[last].astype(bool) & shown & (lengths > 1))
    if not len(chosen):
        found = sorted({str(episode["meta"].get("behaviour")) for episode in episodes})
        raise ValueError(
            f"{', '.join(map(str, cache_dirs))}: need successful episodes of {list(behaviours)}, got behaviours {found}"
        )
    if not np.isfinite(agent_pos).all():
        raise ValueError(f"cloning needs agent_pos in every frame of {', '.join(map(str, cache_dirs))}")
    if len(sizes := {cache.frames.shape[1:] for cache in caches}) > 1:
        raise ValueError(f"caches must have frames of one size, got {sorted(sizes)}")
    instructions = sorted({episodes[episode]["instruction"] for episode in chosen})
    actions = to_normalised(actions)
    instruction_id = np.zeros(len(actions), np.int64)
    waypoint = np.zeros((len(actions), len(WAYPOINT_OF_AGENT_POS)), np.float32)
    for episode in chosen:
        span = slice(starts[episode], last[episode] + 1)
        instruction_id[span] = instructions.index(episodes[episode]["instruction"])
        waypoint[span] = waypoints(actions[span], agent_pos[span])
    return Demonstrations(
        caches=tuple(caches),
        actions=actions,
        agent_pos=agent_pos,
        waypoint=waypoint,
        instruction_id=instruction_id,
        instructions=instructions,
        first=starts[chosen],
        last=last[chosen],
    )


def chunks_of(actions: np.ndarray, start: np.ndarray, length: int, final: np.ndarray | None = None) -> np.ndarray:
    """Return chunks (B, length, 7) of normalised actions (T, 7); the end of the episode is followed by holding.

    Args:
        actions: of one episode, or of several end to end.
        start: (B,) int64, first action of each chunk.
        length: actions of a chunk.
        final: (B,) int64, last action of each chunk's episode; None: the last there is.
    """
    last = np.full(len(start), len(actions) - 1) if final is None else final
    steps = start[:, None] + np.arange(length)
    chunks = actions[np.minimum(steps, last[:, None])]
    chunks[..., :-1][steps > last[:, None]] = 0
    return chunks


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
