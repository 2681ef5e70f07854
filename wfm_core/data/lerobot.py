"""Read LeRobotDataset folders of any version: what their versions share.

A data set row holds the action sent after its frame. The last row's action has no frame after it (and is padding in
every known copy), so an episode of n rows yields n - 1 actions.
"""

import abc
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM
from wfm_core.data.episode import OWN_ACTIONS, Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.video import decode_video

_BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index", "is_last"}
_EPISODE_COLUMNS = {
    "episode_index",
    "tasks",
    "length",
    "dataset_from_index",
    "dataset_to_index",
    "episode_id",
    "command_lag",
}
_NOT_META = ("data/", "videos/", "meta/", "stats/")
_PADDED = [0, 1, 2, 3, 4, 5, 7]
"""Where Bridge states of 8 numbers have ours: the seventh is padding."""


class LeRobotReader(EpisodeSequence, abc.ABC):
    """A LeRobot folder as a sequence of episodes; frames are decoded on access. Versions say where things are.

    Attributes:
        camera: feature name of the frames.
        convention: of the actions.
        command_lag: control steps by which motion trails the action, in episodes that do not say.
    """

    version: str

    def __init__(
        self,
        directory: Path | str,
        *,
        camera: str | None = None,
        state_key: str = "observation.state",
        action_key: str = "action",
        state_columns: Sequence[int] | None = None,
        convention: str = "commanded",
        command_lag: int = 1,
    ) -> None:
        """Read the meta data.

        Args:
            directory: the data set's root, which holds meta/info.json.
            camera: feature name of the frames; None takes the first one of dtype video or image.
            state_key: feature name of the proprioception; a data set may lack it.
            action_key: feature name of the actions.
            state_columns: seven places in the states where x, y, z, roll, pitch, yaw and gripper are; None: the first
                seven, or, of eight, all but the seventh, which Bridge pads with 0.
            convention: action convention where the data set does not say; "own" takes another robot's actions, of any
                size, as they are.
            command_lag: control steps by which motion trails the action, where the data set does not say.

        Raises:
            DataError: not a data set of this version, or its meta data are damaged; names the file.
            ValueError: `camera` or `action_key` is not among its features, or `state_columns` are not seven.
        """
        if state_columns is not None and len(state_columns) != AGENT_POS_DIM:
            raise ValueError(f"state_columns must be {AGENT_POS_DIM} places, got {list(state_columns)}")
        self.directory = Path(directory)
        self.state_key, self.action_key, self.state_columns = state_key, action_key, state_columns
        info_path = self.directory / "meta" / "info.json"
        self.info = read_info(self.directory)
        features, version = self.info["features"], self.info["codebase_version"]
        if not version.startswith(f"v{self.version}"):
            raise DataError(f"{info_path}: LeRobot {version}, expected v{self.version}.x")
        cameras = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
        if camera is None and not cameras:
            raise DataError(f"{info_path}: declares no video or image feature")
        if camera is not None and camera not in cameras:
            raise ValueError(f"camera must be one of {cameras}, got {camera!r}")
        if action_key not in features:
            raise ValueError(f"action_key must be one of {sorted(features)}, got {action_key!r}")
        self.camera: str = camera or cameras[0]
        self.fps = float(self.info["fps"])
        action_info = features[action_key].get("info") or {}
        self.convention: str = action_info.get("convention", convention)
        self.command_lag: int = action_info.get("command_lag", command_lag)
        self._labels = [
            name
            for name, feature in features.items()
            if name not in {*_BOOKKEEPING, state_key, action_key}
            and feature["dtype"] not in ("video", "image", "string", "language")
        ]
        self._episodes = sorted(self._read_episode_table(), key=lambda row: row["episode_index"])
        self._tasks = self._read_tasks()
        self._table = lru_cache(maxsize=2)(read_table)

    @abc.abstractmethod
    def _read_episode_table(self) -> list[dict]:
        """One dict an episode, with `episode_index`, `length` and whatever else is said of it."""

    @abc.abstractmethod
    def _read_tasks(self) -> dict[int, str]:
        """Instructions by `task_index`."""

    @abc.abstractmethod
    def _rows(self, row: dict) -> pa.Table:
        """The rows of an episode."""

    @abc.abstractmethod
    def _video_of(self, row: dict) -> tuple[Path, float]:
        """The video in which an episode is, and where in it, s."""

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._episodes)

    def _read(self, index: int) -> Episode:
        """Read one episode.

        Raises:
            DataError: rows or frames are missing or damaged; names the file.
        """
        row = self._episodes[index]
        number, length = int(row["episode_index"]), int(row["length"])
        table = self._rows(row)
        if len(table) != length:
            raise DataError(f"{self.directory}: episode {number} has {len(table)} rows, its meta data say {length}")
        columns = {name: _numpy(table[name]) for name in table.column_names if name != self.camera}
        found = columns[self.action_key].shape[1:] if self.action_key in columns else ()
        if len(found) != 1 or (found[0] != ACTION_DIM and self.convention != OWN_ACTIONS):
            raise DataError(
                f"{self.directory}: {self.action_key} must have {ACTION_DIM} dimensions, got {found or 'none'}; "
                f"another robot's are read with convention={OWN_ACTIONS}"
            )
        if self.camera in table.column_names:
            frames = self._images(table[self.camera], number)
        else:
            path, start_s = self._video_of(row)
            frames = decode_video(path, start_s, length)
        return Episode(
            frames=frames,
            actions=columns[self.action_key][:-1].astype(np.float32),
            agent_pos=self._states(columns),
            labels={name: columns[name] for name in self._labels if name in columns},
            instruction=self._instruction(row, columns),
            episode_id=str(row.get("episode_id") or f"{number:06d}"),
            convention=self.convention,
            command_lag=int(row.get("command_lag", self.command_lag)),
            meta=self.meta(index),
        )

    def length(self, index: int) -> int:
        """Number of frames of an episode, T + 1, without decoding it."""
        return int(self._episodes[index]["length"])

    def meta(self, index: int) -> dict[str, str | int | float | bool]:
        """What the data set says about an episode beyond its rows (policy, seed, ...), without decoding it."""
        return {
            name: value
            for name, value in self._episodes[index].items()
            if name not in _EPISODE_COLUMNS
            and not name.startswith(_NOT_META)
            and isinstance(value, str | int | float | bool)
        }

    def _instruction(self, row: dict, columns: dict[str, np.ndarray]) -> str:
        tasks = row.get("tasks")
        text = tasks if isinstance(tasks, str) else tasks[0] if tasks else None
        if text is None and "task_index" in columns:
            text = self._tasks.get(int(columns["task_index"][0]))
        return (text or "").split(" | ")[0]  # several captions of one episode are joined by " | "

    def _states(self, columns: dict[str, np.ndarray]) -> np.ndarray | None:
        places = self.state_columns
        if self.state_key not in columns or (places is None and self.convention == OWN_ACTIONS):
            return None
        states = columns[self.state_key]
        if places is None and states.shape[1] in (AGENT_POS_DIM, AGENT_POS_DIM + 1):
            places = range(AGENT_POS_DIM) if states.shape[1] == AGENT_POS_DIM else _PADDED
        if places is None or max(places) >= states.shape[1]:
            raise DataError(
                f"{self.directory}: {self.state_key} must have 7 or 8 dimensions, or those that state_columns name, "
                f"got {states.shape[1]}"
            )
        return states[:, list(places)].astype(np.float32)

    def _images(self, column: pa.ChunkedArray, number: int) -> np.ndarray:
        frames = []
        for place, entry in enumerate(column.to_pylist()):
            encoded = entry.get("bytes") if isinstance(entry, dict) else None
            image = None if not encoded else cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
            if image is None:
                raise DataError(f"{self.directory}: frame {place} of episode {number} is not a readable image")
            frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        return np.stack(frames)


def read_info(directory: Path) -> dict:
    """What meta/info.json says, among it `features` and `codebase_version`, a str.

    Raises:
        DataError: absent, damaged, or it lacks these; names the file.
    """
    path = directory / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        return info | {"features": info["features"], "codebase_version": str(info["codebase_version"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable LeRobot info.json ({error})") from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a table.

    Raises:
        DataError: absent or damaged; names the file.
    """
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def read_table(path: Path) -> pa.Table:
    """Read a table; as `open_parquet`."""
    return open_parquet(path).read()


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)
    return column.to_numpy()
