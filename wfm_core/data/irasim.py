"""Read the JSON + mp4 layout of IRASim and Cosmos: `annotation/<split>/<id>.json`, videos at paths given in it.

Its stored actions are relative poses in the gripper's frame, computed from the states; so the reader computes its
actions from the states too ("relabelled", command lag 0), straight in the base frame. The states' roll is ours less pi,
and their continuous gripper state is 0 = open, 1 = closed, where its stored actions have 1 = open.

Ctrl-World's variant of the layout, with `states` and a video a camera, is refused: of what its states mean, in which
frame and which way the gripper counts, nothing is written down, and a guess would be a wrong action in every step.
"""

import json
from pathlib import Path

import numpy as np

from wfm_core.data.actions import from_irasim_state, relabel
from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.video import decode_video


class IrasimReader(EpisodeSequence):
    """All annotations of a folder, by split and id."""

    convention = "relabelled"
    command_lag = 0

    def __init__(self, directory: Path | str, *, split: str | None = None, camera: int = 0) -> None:
        """List the annotations.

        Args:
            directory: the data set's root, which holds `annotation`.
            split: "train", "val" or "test"; None takes all.
            camera: place of the camera in the annotation's list of videos.

        Raises:
            DataError: there are no annotations.
        """
        self.directory = Path(directory)
        self.camera = camera
        self._paths = sorted((self.directory / "annotation").glob(f"{split or '*'}/*.json"))
        if not self._paths:
            raise DataError(f"{self.directory / 'annotation'}: no {split or '*'}/*.json files")

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._paths)

    def _read(self, index: int) -> Episode:
        """Read one episode.

        Raises:
            DataError: a file is missing or damaged, or frames and states differ in number; names the file.
        """
        path = self._paths[index]
        try:
            note = json.loads(path.read_text())
            if "state" not in note and "states" in note:
                raise ValueError(
                    "has no `state`, only `states` as in Ctrl-World's variant, whose convention is not documented; to "
                    "have them read, write them as `state` (x, y, z, roll - pi, pitch, yaw, gripper 1 = open)"
                )
            states = np.asarray(note["state"], dtype=np.float64)
            if "continuous_gripper_state" in note:
                closedness = np.asarray(note["continuous_gripper_state"], dtype=np.float64).reshape(-1)
            else:
                closedness = 1 - states[:, 6]  # the states' last column is binary, 1 = open
            agent_pos = from_irasim_state(states, closedness)
            video = self.directory / note["videos"][self.camera]["video_path"]
            texts = note.get("texts") or [""]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{path}: not a readable annotation ({type(error).__name__}: {error})") from error
        frames = decode_video(video)
        if len(frames) != len(states):
            raise DataError(f"{video}: has {len(frames)} frames, {path} has {len(states)} states")
        return Episode(
            frames=frames,
            actions=relabel(agent_pos),
            agent_pos=agent_pos,
            instruction=str(texts[0]),
            episode_id=path.relative_to(self.directory / "annotation").with_suffix("").as_posix(),
            convention=self.convention,
            command_lag=self.command_lag,
        )
