"""Read LeRobotDataset v3.0 folders, ours and those in circulation that stock LeRobot cannot load.

Source: the layout of LeRobotDataset v3.0 as written by lerobot 0.6. The non-standard copies differ in path templates,
lack stats.json, and say of an episode only its tasks and length; then the episode's rows are found by its index and its
frames by counting through the video files in order.

A data set row holds the action sent after its frame. The last row's action has no frame after it (and is padding in
every known copy), so an episode of n rows yields n - 1 actions.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wfm_core.data.actions import AGENT_POS_DIM
from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.video import count_frames, decode_video

_BOOKKEEPING = {
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
    "action",
    "observation.state",
    "is_last",
}
_EPISODE_COLUMNS = {"episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index", "episode_id"}
_NOT_META = ("data/", "videos/", "meta/", "stats/")


class LeRobotV3Reader(EpisodeSequence):
    """A LeRobot v3.0 folder as a sequence of episodes; frames are decoded on access."""

    def __init__(
        self,
        directory: Path | str,
        *,
        camera: str | None = None,
        convention: str = "commanded",
        command_lag: int = 1,
    ) -> None:
        """Read the meta data.

        Args:
            directory: the data set's root, which holds meta/info.json.
            camera: feature name of the frames; None takes the first video feature.
            convention: action convention where the data set does not say.
            command_lag: control steps by which motion trails the action, where the data set does not say.

        Raises:
            DataError: not a v3.0 data set, or its meta data are damaged; names the file.
            ValueError: `camera` is not among its video features.
        """
        self.directory = Path(directory)
        info_path = self.directory / "meta" / "info.json"
        try:
            self.info = json.loads(info_path.read_text())
            features, version = self.info["features"], str(self.info["codebase_version"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{info_path}: not a readable LeRobot info.json ({error})") from error
        if not version.startswith("v3"):
            raise DataError(
                f"{info_path}: LeRobot {version}, only v3.x is read; convert it with "
                "python -m lerobot.scripts.convert_dataset_v21_to_v30"
            )
        cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
        if camera is None and not cameras:
            raise DataError(f"{info_path}: declares no video feature")
        if camera is not None and camera not in cameras:
            raise ValueError(f"camera must be one of {cameras}, got {camera!r}")
        self.camera: str = camera or cameras[0]
        self.fps = float(self.info["fps"])
        action_info = features["action"].get("info") or {}
        self.convention: str = action_info.get("convention", convention)
        self.command_lag: int = action_info.get("command_lag", command_lag)
        self._labels = [
            name
            for name, feature in features.items()
            if name not in _BOOKKEEPING and feature["dtype"] not in ("video", "image", "string", "language")
        ]
        self._episodes = self._read_episode_table()
        self._tasks = self._read_tasks()
        self._table = lru_cache(maxsize=2)(_read_table)

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
        columns = {name: _numpy(table[name]) for name in table.column_names}
        path, start_s = self._video_of(row)
        states = columns.get("observation.state")
        return Episode(
            frames=decode_video(path, start_s, length),
            actions=columns["action"][:-1].astype(np.float32),
            agent_pos=None if states is None else _seven(states, self.directory),
            labels={name: columns[name] for name in self._labels if name in columns},
            instruction=self._instruction(row, columns),
            episode_id=str(row.get("episode_id") or f"{number:06d}"),
            convention=self.convention,
            command_lag=self.command_lag,
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

    def _read_episode_table(self) -> list[dict]:
        paths = sorted((self.directory / "meta" / "episodes").glob("**/*.parquet"))
        if not paths:
            raise DataError(f"{self.directory / 'meta' / 'episodes'}: holds no episode table")
        rows: list[dict] = []
        for path in paths:
            table = _open_parquet(path).read()
            kept = [name for name in table.column_names if not name.startswith("stats/")]
            rows += table.select(kept).to_pylist()
        return sorted(rows, key=lambda row: row["episode_index"])

    def _read_tasks(self) -> dict[int, str]:
        path = self.directory / "meta" / "tasks.parquet"
        if not path.is_file():
            return {}
        table = _open_parquet(path).read()
        # The text is a column in some copies, the pandas index in others; either way it is the one column of strings.
        text = next((name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)), None)
        if text is None or "task_index" not in table.column_names:
            raise DataError(f"{path}: needs columns task_index and task, has {table.column_names}")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))

    def _instruction(self, row: dict, columns: dict[str, np.ndarray]) -> str:
        tasks = row.get("tasks")
        text = tasks if isinstance(tasks, str) else tasks[0] if tasks else None
        if text is None and "task_index" in columns:
            text = self._tasks.get(int(columns["task_index"][0]))
        return (text or "").split(" | ")[0]  # several captions of one episode are joined by " | "

    def _rows(self, row: dict) -> pa.Table:
        number = int(row["episode_index"])
        if "data/file_index" in row:
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            paths = [self.directory / self.info["data_path"].format(**place)]
        else:
            paths = self._data_files()
        for path in paths:
            table = self._table(path)
            index = table["episode_index"].to_numpy()
            if number in index:
                # An episode's rows are contiguous, and numbers grow with them.
                first = int(np.searchsorted(index, number))
                return table.slice(first, int(np.searchsorted(index, number, side="right")) - first)
        raise DataError(f"{self.directory / 'data'}: no rows of episode {number}")

    def _data_files(self) -> list[Path]:
        return sorted((self.directory / "data").glob("**/*.parquet"))

    def _video_of(self, row: dict) -> tuple[Path, float]:
        prefix = f"videos/{self.camera}/"
        if row.get(f"{prefix}file_index") is not None:
            place = {"chunk_index": row[f"{prefix}chunk_index"], "file_index": row[f"{prefix}file_index"]}
            path = self.directory / self.info["video_path"].format(video_key=self.camera, **place)
            return path, float(row[f"{prefix}from_timestamp"])
        return self._video_places()[int(row["episode_index"])]

    def _video_places(self) -> dict[int, tuple[Path, float]]:
        """Find the episodes in the video files by counting: files and episodes in order, none split over files."""
        if not hasattr(self, "_places"):
            videos = sorted((self.directory / "videos" / self.camera).glob("**/*.mp4"))
            videos = videos or sorted(p for p in (self.directory / "videos").glob("**/*.mp4") if self.camera in p.parts)
            if not videos:
                raise DataError(f"{self.directory / 'videos'}: no video of {self.camera}")
            self._places: dict[int, tuple[Path, float]] = {}
            remaining = iter(videos)
            path, held, used = videos[0], 0, 0
            for row in self._episodes:
                if used == held:
                    following = next(remaining, None)
                    if following is None:
                        raise DataError(f"{path}: the videos end before episode {row['episode_index']}")
                    path, held, used = following, count_frames(following), 0
                if used + row["length"] > held:
                    needed = f"episode {row['episode_index']} needs {used} to {used + row['length']}"
                    raise DataError(f"{path}: holds {held} frames, {needed}")
                self._places[int(row["episode_index"])] = (path, used / self.fps)
                used += row["length"]
        return self._places


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _read_table(path: Path) -> pa.Table:
    return _open_parquet(path).read()


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)
    return column.to_numpy()


def _seven(states: np.ndarray, directory: Path) -> np.ndarray:
    """Drop the padding that 8-dimensional Bridge states carry between yaw and gripper."""
    if states.shape[1] == AGENT_POS_DIM + 1:
        states = np.delete(states, AGENT_POS_DIM - 1, axis=1)
    if states.shape[1] != AGENT_POS_DIM:
        raise DataError(f"{directory}: observation.state must have 7 or 8 dimensions, got {states.shape[1]}")
    return states.astype(np.float32)
