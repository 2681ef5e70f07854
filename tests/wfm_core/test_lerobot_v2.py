"""Data sets in the LeRobot v2 layout, as the Bridge copy in wide use has it; and keys of other names."""

import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wfm_core.data.files import DataError
from wfm_core.data.lerobot import LeRobotReader
from wfm_core.data.lerobot_v2 import LeRobotV2Reader
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import encode_video

CAMERAS = ("observation.images.image_0", "observation.images.image_1")
LENGTHS = {0: 5, 1: 7, 2003: 4}  # of which the last lies in another chunk


def frames_of(number: int, camera: int) -> np.ndarray:
    return np.random.default_rng([number, camera]).integers(0, 256, (LENGTHS[number], 16, 24, 3), dtype=np.uint8)


def rows_of(number: int) -> dict[str, np.ndarray]:
    rng, length = np.random.default_rng(number), LENGTHS[number]
    state = rng.normal(size=(length, 8)).astype(np.float32)
    return {"action": rng.normal(size=(length, 7)).astype(np.float32), "observation.state": state}


def table_of(number: int, rename: dict[str, str]) -> dict:
    length = LENGTHS[number]
    columns = {rename.get(name, name): list(value) for name, value in rows_of(number).items()}
    return columns | {
        "next.reward": np.arange(length, dtype=np.float32),
        "timestamp": np.arange(length, dtype=np.float32) / 5,
        "frame_index": np.arange(length),
        "episode_index": np.full(length, number),
        "index": np.arange(length),
        "task_index": np.full(length, number % 2),
    }


def write_set(root, rename: dict[str, str] | None = None, images: bool = False):
    rename = rename or {}
    features: dict = {name: {"dtype": "image" if images else "video", "shape": [16, 24, 3]} for name in CAMERAS}
    features |= {rename.get("observation.state", "observation.state"): {"dtype": "float32", "shape": [8]}}
    features |= {rename.get("action", "action"): {"dtype": "float32", "shape": [7]}}
    features |= {"next.reward": {"dtype": "float32", "shape": [1]}}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1]}
    (root / "meta").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "widowx",
        "fps": 5,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    episodes = [{"episode_index": k, "tasks": ["put it | place it"][:k], "length": n} for k, n in LENGTHS.items()]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, reversed(episodes))) + "\n\n")
    tasks = [{"task_index": 0, "task": "open it"}, {"task_index": 1, "task": ""}]
    (root / "meta" / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    for number in LENGTHS:
        table = table_of(number, rename)
        for camera, name in enumerate(CAMERAS):
            frames = frames_of(number, camera)
            if images:
                pngs = [cv2.imencode(".png", frame[..., ::-1])[1].tobytes() for frame in frames]
                table[name] = [{"bytes": png, "path": None} for png in pngs]
            else:
                path = root / f"videos/chunk-{number // 1000:03d}/{name}/episode_{number:06d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_video(frames, 5))
        path = root / f"data/chunk-{number // 1000:03d}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    return root


def check(reader: LeRobotReader, camera: int = 0) -> None:
    for k, number in ((2, 2003), (0, 0), (1, 1)):
        episode, rows = reader[k], rows_of(number)
        np.testing.assert_array_equal(episode.frames, frames_of(number, camera))
        np.testing.assert_array_equal(episode.actions, rows["action"][:-1])
        np.testing.assert_array_equal(episode.agent_pos, np.delete(rows["observation.state"], 6, axis=1))  # the padding
        np.testing.assert_array_equal(episode.labels["next.reward"], np.arange(LENGTHS[number]))
        assert list(episode.labels) == ["next.reward"] and episode.episode_id == f"{number:06d}"
        assert reader.length(k) == LENGTHS[number]


def test_episodes_with_files_of_their_own(tmp_path):
    reader = open_dataset(write_set(tmp_path / "set"))
    assert isinstance(reader, LeRobotV2Reader) and len(reader) == 3
    check(reader)
    assert [reader[k].instruction for k in range(3)] == ["open it", "put it", "put it"]
    assert (reader[0].convention, reader[0].command_lag) == ("commanded", 1)
    check(LeRobotV2Reader(tmp_path / "set", camera=CAMERAS[1]), camera=1)


def test_frames_that_are_images_in_the_table(tmp_path):
    root = write_set(tmp_path / "set", images=True)
    check(LeRobotV2Reader(root, camera=CAMERAS[1]), camera=1)
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    broken = table[CAMERAS[0]].to_pylist()
    broken[4] = {"bytes": b"no image", "path": None}
    place = table.column_names.index(CAMERAS[0])
    pq.write_table(table.set_column(place, CAMERAS[0], pa.array(broken, table.schema.field(place).type)), path)
    with pytest.raises(DataError, match="frame 4 of episode 1 is not a readable image"):
        LeRobotV2Reader(root)[1]


def test_keys_of_other_names_and_states_of_other_sizes(tmp_path):
    root = write_set(tmp_path / "set", {"action": "delta", "observation.state": "eef"})
    check(LeRobotV2Reader(root, action_key="delta", state_key="eef"))
    turned = LeRobotV2Reader(root, action_key="delta", state_key="eef", state_columns=[7, 5, 4, 3, 2, 1, 0])[0]
    np.testing.assert_array_equal(turned.agent_pos, rows_of(0)["observation.state"][:, [7, 5, 4, 3, 2, 1, 0]])
    assert LeRobotV2Reader(root, action_key="delta", state_key="nothing")[0].agent_pos is None
    with pytest.raises(ValueError, match=r"action_key must be one of \['delta', .*, got 'action'"):
        LeRobotV2Reader(root)
    with pytest.raises(ValueError, match="state_columns must be 7 places, got"):
        LeRobotV2Reader(root, action_key="delta", state_columns=[1, 2])
    with pytest.raises(ValueError, match=r"camera must be one of .*image_1'\], got 'wrist'"):
        LeRobotV2Reader(root, action_key="delta", camera="wrist")
    with pytest.raises(DataError, match="eef must have 7 or 8 dimensions, or those that state_columns name, got 8"):
        LeRobotV2Reader(root, action_key="delta", state_key="eef", state_columns=[7, 8, 4, 3, 2, 1, 0])[0]
    with pytest.raises(DataError, match=r"eef must have 7 dimensions, got \(8,\)"):
        LeRobotV2Reader(root, action_key="eef")[0]


def test_damage_names_the_file(tmp_path):
    root = write_set(tmp_path / "set")
    (root / "data/chunk-000/episode_000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"episode_000001\.parquet: not a readable parquet file"):
        LeRobotV2Reader(root)[1]
    (root / f"videos/chunk-002/{CAMERAS[0]}/episode_002003.mp4").unlink()
    with pytest.raises(DataError, match=r"episode_002003\.mp4: the video is missing"):
        LeRobotV2Reader(root)[2]
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index": 0}')
    with pytest.raises(DataError, match=r"episodes\.jsonl, line 1: needs episode_index, length, got"):
        LeRobotV2Reader(root)
    (root / "meta" / "episodes.jsonl").unlink()
    with pytest.raises(DataError, match=r"episodes\.jsonl: not a readable table"):
        LeRobotV2Reader(root)
    info = json.loads((root / "meta" / "info.json").read_text())
    del info["codebase_version"]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"info\.json: not a readable LeRobot info\.json \('codebase_version'\)"):
        open_dataset(root)
