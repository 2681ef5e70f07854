"""Read BridgeData V2 as it was recorded: a folder a trajectory, with JPEG frames and pickled states and actions.

    .../<YYYY-mm-dd_HH-MM-SS>/[raw/]traj_groupG/trajI/{images0/im_T.jpg, ..., obs_dict.pkl, policy_out.pkl, lang.txt}

There is one frame and one state more than actions. Before 2021-07-23 a frame was taken one step too late; the first
frame and the last action of such a trajectory are dropped, after which motion no longer trails the action.

Source: Walke et al., "BridgeData V2" (CoRL 2023), its data processing.
"""

import re
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM
from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.pickles import load_pickle

LATENCY_MENDED = date(2021, 7, 23)
"""From this day on, frames were recorded at the time that they say."""
STATES, ACTIONS, LANGUAGE = "obs_dict.pkl", "policy_out.pkl", "lang.txt"
_DAY = re.compile(r"(\d{4})-(\d{2})-(\d{2})_\d{2}-\d{2}-\d{2}")


class BridgeRawReader(EpisodeSequence):
    """All trajectories under a folder, by path."""

    convention = "commanded"

    def __init__(self, directory: Path | str, *, camera: int = 0) -> None:
        """List the trajectories: folders with states or actions, so that one that lacks the others is not passed over.

        Args:
            directory: searched with its sub-folders; what lies in a folder whose name has "lmdb" in it is a copy.
            camera: number k of the folder `images<k>`; 0 looks over the robot's shoulder and does not move.

        Raises:
            DataError: there are no trajectories.
        """
        self.directory, self.camera = Path(directory), camera
        found = sorted({path.parent for name in (STATES, ACTIONS) for path in self.directory.rglob(name)})
        self._paths = [
            path for path in found if not any("lmdb" in part for part in path.relative_to(self.directory).parts)
        ]
        if not self._paths:
            raise DataError(f"{self.directory}: no folders with {STATES} or {ACTIONS}")

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self._paths)

    def _read(self, index: int) -> Episode:
        """Read one trajectory.

        Raises:
            DataError: a file is missing or damaged, or frames, states and actions differ in number; names the file.
        """
        path = self._paths[index]
        states, actions, frames = self._states(path), _actions(path / ACTIONS), self._frames(path)
        if not len(frames) == len(states) == len(actions) + 1:
            counts = f"{len(frames)} frames, {len(states)} states and {len(actions)} actions"
            raise DataError(f"{path}: must have one frame and one state more than actions, has {counts}")
        late = _recorded_on(path) < LATENCY_MENDED
        if late:
            frames, states, actions = frames[1:], states[1:], actions[:-1]
        return Episode(
            frames=frames,
            actions=actions,
            agent_pos=states,
            instruction=_instruction(path / LANGUAGE),
            episode_id=path.relative_to(self.directory).as_posix(),
            convention=self.convention,
            command_lag=0 if late else 1,
        )

    def _states(self, path: Path) -> np.ndarray:
        observed = load_pickle(path / STATES)
        try:
            states = np.asarray(observed["full_state"], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path / STATES}: has no readable full_state ({error!r})") from error
        if states.ndim != 2 or states.shape[1] != AGENT_POS_DIM:
            raise DataError(f"{path / STATES}: full_state must be (T + 1, {AGENT_POS_DIM}), got {states.shape}")
        return states

    def _frames(self, path: Path) -> np.ndarray:
        folder = path / f"images{self.camera}"
        files = {int(file.stem.removeprefix("im_")): file for file in folder.glob("im_*.jpg")}
        if not files:
            there = sorted(each.name for each in path.glob("images*"))
            raise DataError(f"{folder}: holds no im_*.jpg; the trajectory has {', '.join(there) or 'no images'}")
        frames = []
        for number in range(len(files)):
            file = files.get(number)
            image = None if file is None else cv2.imread(str(file), cv2.IMREAD_COLOR)
            if image is None:
                raise DataError(f"{folder / f'im_{number}.jpg'}: missing, or not a readable image")
            frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        return np.stack(frames)


def _actions(path: Path) -> np.ndarray:
    """Actions (T, 7) of a list of T dicts with `actions`, or, in old recordings, of T arrays."""
    steps: Any = load_pickle(path)
    try:
        actions = np.asarray([step["actions"] if isinstance(step, dict) else step for step in steps], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: has no readable actions ({error!r})") from error
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM:
        raise DataError(f"{path}: actions must be (T, {ACTION_DIM}), got {actions.shape}")
    return actions


def _recorded_on(path: Path) -> date:
    """The day that the nearest folder above a trajectory is named after."""
    for part in reversed(path.parts):
        if day := _DAY.fullmatch(part):
            return date(*map(int, day.groups()))
    raise DataError(f"{path}: lies in no folder named YYYY-mm-dd_HH-MM-SS, which says whether its frames are late")


def _instruction(path: Path) -> str:
    """The first line that is an instruction; others say how sure the annotator was."""
    if not path.is_file():
        return ""
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in lines if line.strip() and "confidence" not in line), "")
