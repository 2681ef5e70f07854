"""Read LeRobotDataset v2.0 and v2.1 folders, in which an episode has a table and a video of its own.

The Bridge copy in wide use is of this kind: `bridge_orig_lerobot`, 53,192 episodes with up to four cameras.
"""

import json
from pathlib import Path

import pyarrow as pa

from wfm_core.data.files import DataError
from wfm_core.data.lerobot import LeRobotReader


class LeRobotV2Reader(LeRobotReader):
    """A LeRobot v2 folder; its tables and videos are where info.json says."""

    version = "2"

    def _read_episode_table(self) -> list[dict]:
        return self._lines("episodes.jsonl", "episode_index", "length")

    def _read_tasks(self) -> dict[int, str]:
        return {line["task_index"]: line["task"] for line in self._lines("tasks.jsonl", "task_index", "task")}

    def _rows(self, row: dict) -> pa.Table:
        return self._table(self._path("data_path", row))

    def _video_of(self, row: dict) -> tuple[Path, float]:
        return self._path("video_path", row), 0.0

    def _lines(self, name: str, *needed: str) -> list[dict]:
        path = self.directory / "meta" / name
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable table ({error})") from error
        for number, line in enumerate(lines, start=1):
            if not isinstance(line, dict) or not line.keys() >= set(needed):
                raise DataError(f"{path}, line {number}: needs {', '.join(needed)}, got {line}")
        return lines

    def _path(self, template: str, row: dict) -> Path:
        number = int(row["episode_index"])
        place = {"episode_chunk": number // int(self.info.get("chunks_size", 1000)), "episode_index": number}
        try:
            return self.directory / self.info[template].format(video_key=self.camera, **place)
        except (KeyError, IndexError, ValueError) as error:
            path = self.directory / "meta" / "info.json"
            raise DataError(f"{path}: its {template} cannot be read ({error!r})") from error
