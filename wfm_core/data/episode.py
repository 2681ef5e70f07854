"""One episode, whatever file it came from."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np

from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM, CONTROL_HZ, hold_action, relabel
from wfm_core.data.video import resize_frames

UNKNOWN_ACTIONS = "unknown"
"""The convention of a source that has frames only."""
OWN_ACTIONS = "own"
"""The convention of another robot, whose actions are taken as they are recorded, whatever they mean."""


@dataclass(frozen=True)
class Episode:
    """T control steps between T + 1 frames, in the project's action convention.

    Attributes:
        frames: (T + 1, H, W, 3) uint8; frame t is seen before action t, frame T after the last action.
        actions: (T, 7) float32, physical units (see `wfm_core.data.actions`); NaN where they are unknown. Those of the
            convention `OWN_ACTIONS` are (T, A), in units of their own.
        agent_pos: (T + 1, 7) float32, or None where the source has no proprioception.
        labels: name -> (T + 1,) or (T + 1, k) array aligned with frames: reward terms ("reward.reach", float32),
            "success" and "failure" (bool), whatever the source has.
        instruction: the language instruction, "" if none.
        episode_id: unique within its data set.
        convention: the source's action convention before conversion, e.g. "commanded" or "relabelled", or
            `UNKNOWN_ACTIONS` or `OWN_ACTIONS`.
        command_lag: steps by which motion trails the action (1 for commanded data, 0 for relabelled data).
        views: name -> (T + 1, H, W, 3) uint8, what further cameras saw at the same moments.
        meta: further plain values of the source (initial_state, seed, policy, ...).
    """

    frames: np.ndarray
    actions: np.ndarray
    agent_pos: np.ndarray | None
    instruction: str
    episode_id: str
    convention: str
    command_lag: int
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, str | int | float | bool] = field(default_factory=dict)
    views: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = len(self.actions)
        for name, frames in ({"frames": self.frames} | self.views).items():
            if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
                raise ValueError(f"{name} must be uint8 (T + 1, H, W, 3), got {frames.dtype} {frames.shape}")
            if len(frames) != steps + 1:
                raise ValueError(
                    f"episode {self.episode_id}: {steps} actions need {steps + 1} frames, got {len(frames)} ({name})"
                )
        if unfit := [name for name in self.views if not name.isidentifier() or name == "frames"]:
            raise ValueError(f"views must have names of letters, digits and _, other than frames, got {unfit}")
        own = self.convention == OWN_ACTIONS
        if self.actions.ndim != 2 or not (own or self.actions.shape[1] == ACTION_DIM):
            raise ValueError(f"actions must have shape (T, {ACTION_DIM}), got {self.actions.shape}")
        if self.agent_pos is not None and self.agent_pos.shape != (steps + 1, AGENT_POS_DIM):
            raise ValueError(f"agent_pos must have shape ({steps + 1}, {AGENT_POS_DIM}), got {self.agent_pos.shape}")
        if self.convention == UNKNOWN_ACTIONS and not np.isnan(self.actions).all():
            raise ValueError(f"episode {self.episode_id}: actions must be NaN where they are unknown")
        if self.convention != UNKNOWN_ACTIONS and not np.isfinite(self.actions).all():
            raise ValueError(f"episode {self.episode_id}: actions must be finite")
        for name, label in self.labels.items():
            if len(label) != steps + 1:
                raise ValueError(f"label {name!r} must have {steps + 1} rows (one a frame), got {len(label)}")

    @property
    def action_rows(self) -> np.ndarray:
        """One action a frame, (T + 1, 7) float32: at last one that holds the pose; another robot's last one again."""
        if self.convention == OWN_ACTIONS and len(self.actions):
            last = self.actions[-1]
        else:
            last = hold_action(float(self.actions[-1, -1]) if len(self.actions) else 1.0)
        return np.concatenate([self.actions, last[None]]).astype(np.float32)

    def resized(self, height: int, width: int) -> "Episode":
        """The same episode with frames and views (T + 1, height, width, 3)."""
        views = {name: resize_frames(frames, height, width) for name, frames in self.views.items()}
        return replace(self, frames=resize_frames(self.frames, height, width), views=views)

    def relabelled(self) -> "Episode":
        """The same episode with actions that describe what was reached (see `wfm_core.data.actions.relabel`).

        Raises:
            ValueError: it has no proprioception.
        """
        if self.agent_pos is None:
            raise ValueError(f"relabel needs proprioception, got none in episode {self.episode_id}")
        return replace(self, actions=relabel(self.agent_pos), convention="relabelled", command_lag=0)


class EpisodeSequence(Sequence[Episode], abc.ABC):
    """Episodes that are read when asked for; subclasses say how many there are and how one is read.

    Attributes:
        fps: frames and actions a second; that of Bridge where a format does not say.
    """

    fps: float = CONTROL_HZ

    @abc.abstractmethod
    def _read(self, index: int) -> Episode:
        """Read the episode at 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        """Read one episode, or several.

        Raises:
            IndexError: no such episode.
            DataError: a file is missing or damaged; names the file.
        """
        if isinstance(index, slice):
            return [self._read(k) for k in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])
