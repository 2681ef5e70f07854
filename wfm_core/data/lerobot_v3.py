"""Read LeRobotDataset v3.0 folders, ours and those in circulation that stock LeRobot cannot load.

Source: the layout of LeRobotDataset v3.0 as written by lerobot 0.6. The non-standard copies differ in path templates,
lack stats.json, and say of an episode only its tasks and length; then the episode's rows are found by its index and its
frames by counting through the video files in order.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from wfm_core.data.files import DataError
from wfm_core.data.lerobot import LeRobotReader, open_parquet
from wfm_core.data.video import count_frames


class LeRobotV3Reader(LeRobotReader):
    """A LeRobot v3.0 folder: many episodes in a table, and in a video."""

    version = "3"

    def _read_episode_table(self) -> list[dict]:
        paths = sorted((self.directory / "meta" / "episodes").glob("**/*.parquet"))
        if not paths:
            raise DataError(f"{self.directory / 'meta' / 'episodes'}: holds no episode table")
        rows: list[dict] = []
        for path in paths:
            table = open_parquet(path).read()
            kept = [name for name in table.column_names if not name.startswith("stats/")]
            rows += table.select(kept).to_pylist()
        return rows

    def _read_tasks(self) -> dict[int, str]:
        path = self.directory / "meta" / "tasks.parquet"
        if not path.is_file():
            return {}
        table = open_parquet(path).read()
        # The text is a column in some copies, the pandas index in others; either way it is the one column of strings.
        text = next((name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)), None)
        if text is None or "task_index" not in table.column_names:
            raise DataError(f"{path}: needs columns task_index and task, has {table.column_names}")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))

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
