"""Write the LeRobotDataset v3.0 layout, in two stages that survive a kill at any moment.

Stage 1, any number of processes: `stage_episode` puts one episode into a staging folder, the videos first and the
table, which makes it count, last. Stage 2, once: `assemble_dataset` joins the videos without re-encoding and writes
tables and meta data; meta/info.json comes last and makes the data set complete.

An episode of T actions has T + 1 rows, one a frame. The last row has no action of its own: it holds the pose with the
last gripper target and is marked `is_last`. Episode meta data are columns of meta/episodes. The action convention and
the first episode's command lag stand in info.json under features/action/info, where LeRobot keeps them when it edits a
data set; an episode's own lag is one of its columns.
"""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wfm_core.data.actions import ACTION_NAMES, AGENT_POS_NAMES, CONTROL_HZ
from wfm_core.data.episode import OWN_ACTIONS, Episode
from wfm_core.data.files import DataError, write_atomic
from wfm_core.data.lerobot_stats import column_stats, image_stats, pixel_histogram
from wfm_core.data.video import ENCODINGS, VideoEncoding, encode_video, join_videos

IMAGES = "observation.images."
DEFAULT_CAMERA = f"{IMAGES}image_0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
FILES_PER_CHUNK = 1000
# A file is joined in memory (about 25 MB of lossless 128x128 video), and opening one parses an index of all its frames.
VIDEO_FILE_SECONDS = 800
ROWS_PER_DATA_FILE = 500_000

_STANDARD = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class StagedVideo:
    """What one camera saw in a staged episode, without the pixels."""

    path: Path
    histogram: np.ndarray  # (3, 256) int64, pixel values of the sampled frames
    frame_shape: tuple[int, int, int]


@dataclass(frozen=True)
class StagedEpisode:
    """An episode in the staging folder, without its pixels; of its videos that of the frames has the name ""."""

    index: int
    columns: dict[str, np.ndarray]
    videos: dict[str, StagedVideo]
    header: dict

    @property
    def num_rows(self) -> int:
        """T + 1."""
        return len(self.columns["action"])

    @property
    def name(self) -> str:
        """What its files begin with."""
        return _stem(self.index)


def stage_episode(
    staging_dir: Path,
    index: int,
    episode: Episode,
    encoding: VideoEncoding = ENCODINGS["lossless"],
    fps: float = CONTROL_HZ,
) -> None:
    """Write one episode into the staging folder; safe to call again for the same index.

    Args:
        staging_dir: folder shared by all workers.
        index: the episode's place in the data set.
        episode: what to write.
        encoding: how to encode its frames and views, the same for all episodes of a data set.
        fps: frames a second, likewise.

    Raises:
        OSError: the disk is full or not writable; names the file. Episodes staged before are untouched.
    """
    steps = len(episode.actions)
    columns = {"action": episode.action_rows}
    if episode.agent_pos is not None:
        columns["observation.state"] = episode.agent_pos.astype(np.float32)
    columns |= episode.labels
    columns["is_last"] = np.arange(steps + 1) == steps
    header = {
        "instruction": episode.instruction,
        "episode_id": episode.episode_id,
        "convention": episode.convention,
        "command_lag": episode.command_lag,
        "meta": episode.meta,
    }
    arrays: dict[str, Any] = {f"column/{name}": value for name, value in columns.items()}
    for view, frames in ({"": episode.frames} | episode.views).items():
        histogram = pixel_histogram(frames)
        arrays |= {f"histogram{_suffix(view)}": histogram, f"frame_shape{_suffix(view)}": np.array(frames.shape[1:])}
        write_atomic(_video_path(staging_dir, index, view), encode_video(frames, fps, encoding))
    table = io.BytesIO()
    np.savez(table, **arrays, header=np.array(json.dumps(header)))
    write_atomic(_table_path(staging_dir, index), table.getvalue())


def staged_indices(staging_dir: Path) -> list[int]:
    """Return the indices of the episodes that are completely staged, in order."""
    return sorted(int(path.stem.removeprefix("episode-")) for path in staging_dir.glob("episode-*.npz"))


def read_staged(staging_dir: Path, index: int) -> StagedEpisode:
    """Read a staged episode's table.

    Raises:
        DataError: the file is damaged; names it.
    """
    table_path = _table_path(staging_dir, index)
    try:
        with np.load(table_path) as table:
            columns = {name.removeprefix("column/"): table[name] for name in table if name.startswith("column/")}
            videos = {}
            for view in (name.removeprefix("histogram").lstrip(".") for name in table if name.startswith("histogram")):
                height, width, channels = (int(size) for size in table[f"frame_shape{_suffix(view)}"])
                videos[view] = StagedVideo(
                    _video_path(staging_dir, index, view),
                    table[f"histogram{_suffix(view)}"],
                    (height, width, channels),
                )
            return StagedEpisode(index, columns, videos, json.loads(str(table["header"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{table_path}: damaged staged episode ({error}); delete it to record it again") from error


def assemble_dataset(
    staging_dir: Path,
    out_dir: Path,
    *,
    camera: str = DEFAULT_CAMERA,
    robot_type: str = "widowx",
    encoding: VideoEncoding = ENCODINGS["lossless"],
    fps: float = CONTROL_HZ,
) -> None:
    """Build the data set from all staged episodes, in index order; a half-built one is built anew.

    Args:
        staging_dir: where `stage_episode` wrote; left as it is.
        out_dir: the data set's root; its data/, videos/ and meta/ are replaced.
        camera: feature name of the frames; that of a view is its name behind `IMAGES`.
        robot_type: recorded in info.json.
        encoding: recorded in info.json; what the episodes were staged with.
        fps: likewise.

    Raises:
        DataError: no episodes, a damaged one, episodes that disagree on columns, frame sizes or action convention, or a
            view of the camera's name.
        OSError: the disk is full; names the file. Staged episodes are untouched.
    """
    fps = int(fps) if fps == int(fps) else fps  # stock LeRobot wants a whole number
    episodes = [read_staged(staging_dir, index) for index in staged_indices(staging_dir)]
    if not episodes:
        raise DataError(f"{staging_dir}: no staged episodes to assemble")
    _check_uniform(episodes)
    keys = {view: f"{IMAGES}{view}" if view else camera for view in episodes[0].videos}  # view -> feature name
    if len(set(keys.values())) < len(keys):
        raise DataError(f"{staging_dir}: views must not be called as the camera {camera}, got {list(keys)[1:]}")
    (out_dir / "meta" / "info.json").unlink(missing_ok=True)
    for name in ("data", "videos", "meta"):
        shutil.rmtree(out_dir / name, ignore_errors=True)

    lengths = [episode.num_rows for episode in episodes]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tasks = list(dict.fromkeys(episode.header["instruction"] for episode in episodes))
    tables = [_rows(episode, k, int(starts[k]), tasks, fps) for k, episode in enumerate(episodes)]
    rows: list[dict] = [
        {
            "episode_index": k,
            "tasks": [episode.header["instruction"]],
            "length": lengths[k],
            "dataset_from_index": int(starts[k]),
            "dataset_to_index": int(starts[k + 1]),
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            "command_lag": episode.header["command_lag"],
        }
        for k, episode in enumerate(episodes)
    ]

    for number, (first, last) in enumerate(_files(lengths, ROWS_PER_DATA_FILE)):
        place = dict(zip(("chunk_index", "file_index"), divmod(number, FILES_PER_CHUNK), strict=True))
        _write_tables(out_dir / DATA_PATH.format(**place), tables[first:last])
        for row in rows[first:last]:
            row |= {f"data/{name}": value for name, value in place.items()}
    for number, (first, last) in enumerate(_files(lengths, int(VIDEO_FILE_SECONDS * fps))):
        place = dict(zip(("chunk_index", "file_index"), divmod(number, FILES_PER_CHUNK), strict=True))
        for view, key in keys.items():
            parts = [(episode.videos[view].path, episode.num_rows) for episode in episodes[first:last]]
            write_atomic(out_dir / VIDEO_PATH.format(video_key=key, **place), join_videos(parts, fps))
            for k, row in enumerate(rows[first:last], start=first):
                row |= {f"videos/{key}/{name}": value for name, value in place.items()}
                row[f"videos/{key}/from_timestamp"] = float(starts[k] - starts[first]) / fps
                row[f"videos/{key}/to_timestamp"] = float(starts[k + 1] - starts[first]) / fps

    for row, episode, table in zip(rows, episodes, tables, strict=True):
        row |= _episode_meta(episode, taken=row)
        seen = {key: image_stats(episode.videos[view].histogram, episode.num_rows) for view, key in keys.items()}
        stats = column_stats([table]) | seen
        row |= {f"stats/{name}/{stat}": value for name, entry in stats.items() for stat, value in entry.items()}
    write_atomic(out_dir / EPISODES_PATH, _parquet([pa.Table.from_pylist(_same_keys(rows))]))
    write_atomic(out_dir / "meta" / "tasks.parquet", _parquet([_task_table(tasks)]))
    pixels = {
        key: image_stats(np.sum([episode.videos[view].histogram for episode in episodes], axis=0), int(starts[-1]))
        for view, key in keys.items()
    }
    write_atomic(out_dir / "meta" / "stats.json", _json(column_stats(tables) | pixels))
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "fps": fps,
        "total_episodes": len(episodes),
        "total_frames": int(starts[-1]),
        "total_tasks": len(tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "splits": {"train": f"0:{len(episodes)}"},
        "features": _features(episodes[0], tables[0], keys, encoding, fps),
    }
    write_atomic(out_dir / "meta" / "info.json", _json(info))


def _stem(index: int) -> str:
    return f"episode-{index:06d}"


def _suffix(view: str) -> str:
    return f".{view}" if view else ""


def _video_path(staging_dir: Path, index: int, view: str) -> Path:
    return staging_dir / f"{_stem(index)}{_suffix(view)}.mp4"


def _table_path(staging_dir: Path, index: int) -> Path:
    return staging_dir / f"{_stem(index)}.npz"


def _check_uniform(episodes: Sequence[StagedEpisode]) -> None:
    def signature(episode: StagedEpisode) -> tuple:
        columns = tuple((name, value.dtype.str, value.shape[1:]) for name, value in episode.columns.items())
        sizes = tuple((view, video.frame_shape) for view, video in episode.videos.items())
        return columns, sizes, episode.header["convention"]

    for episode in episodes:
        if signature(episode) != signature(episodes[0]):
            raise DataError(
                f"{episode.name}: columns, frame sizes and action convention must be those of "
                f"{episodes[0].name}, {signature(episodes[0])}, got {signature(episode)}"
            )


def _files(lengths: Sequence[int], max_rows: int) -> Iterator[tuple[int, int]]:
    """Group episodes into files of at most `max_rows` rows (at least one episode each): yields (first, last + 1)."""
    bounds, rows = [0], 0
    for k, length in enumerate(lengths):
        if rows and rows + length > max_rows:
            bounds.append(k)
            rows = 0
        rows += length
    yield from pairwise([*bounds, len(lengths)])


def _rows(episode: StagedEpisode, number: int, start: int, tasks: Sequence[str], fps: float) -> dict[str, np.ndarray]:
    length = episode.num_rows
    frame_index = np.arange(length, dtype=np.int64)
    return episode.columns | {
        "timestamp": (frame_index / fps).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.full(length, number, dtype=np.int64),
        "index": start + frame_index,
        "task_index": np.full(length, tasks.index(episode.header["instruction"]), dtype=np.int64),
    }


def _episode_meta(episode: StagedEpisode, taken: Mapping[str, object]) -> dict[str, object]:
    meta = {"episode_id": episode.header["episode_id"]} | episode.header["meta"]
    clash = [name for name in meta if name in taken or "/" in name]
    if clash:
        raise DataError(f"{episode.name}: meta names {clash} are taken by LeRobot or contain a slash")
    return meta


def _same_keys(rows: list[dict]) -> list[dict]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _arrow(value: np.ndarray) -> pa.Array:
    if value.ndim == 1:
        return pa.array(value)
    return pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), int(np.prod(value.shape[1:])))


def _write_tables(path: Path, tables: Sequence[Mapping[str, np.ndarray]]) -> None:
    """One row group an episode, so that reading one episode reads one group."""
    write_atomic(path, _parquet([pa.table({name: _arrow(value) for name, value in rows.items()}) for rows in tables]))


def _parquet(groups: Sequence[pa.Table]) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, groups[0].schema, compression="snappy") as writer:
        for group in groups:
            writer.write_table(group)
    return sink.getvalue()


def _task_table(tasks: Sequence[str]) -> pa.Table:
    """The task table as pandas would write it with the task as index, which is what LeRobot reads."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    column = {"metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"} | column
        ],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"} | column,
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"} | column,
        ],
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _features(
    episode: StagedEpisode,
    rows: Mapping[str, np.ndarray],
    keys: Mapping[str, str],
    encoding: VideoEncoding,
    fps: float,
) -> dict[str, dict]:
    own = episode.header["convention"] == OWN_ACTIONS
    names = {"action": None if own else list(ACTION_NAMES), "observation.state": list(AGENT_POS_NAMES)}
    features = {key: _video_feature(episode.videos[view].frame_shape, encoding, fps) for view, key in keys.items()}
    for name, value in rows.items():
        shape = list(value.shape[1:]) or [1]
        features[name] = {"dtype": value.dtype.name, "shape": shape, "names": names.get(name)}
    features["action"]["info"] = {
        "convention": episode.header["convention"],
        "command_lag": episode.header["command_lag"],
        "last_row_is_hold": not own,
    }
    return features


def _video_feature(frame_shape: tuple[int, int, int], encoding: VideoEncoding, fps: float) -> dict:
    height, width, channels = frame_shape
    return {
        "dtype": "video",
        "shape": [height, width, channels],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            # LeRobot re-encodes in this format when it edits a data set. It knows no RGB h264: let it take its default.
            **({} if encoding.codec == "libx264rgb" else {"video.pix_fmt": encoding.pix_fmt}),
            "video.fps": fps,
            "video.channels": channels,
            "has_audio": False,
            "is_depth_map": False,
        },
    }


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=2).encode()
