"""Data sets in the LeRobot v2 layout, as the Bridge copy in wide use has it; and keys of other names."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import AV1, CAMERAS, LENGTHS, encode_av1, frames_of, grey_frames, rows_of, write_v2

from wfm_core.data.files import DataError
from wfm_core.data.lerobot import LeRobotReader
from wfm_core.data.lerobot_v2 import LeRobotV2Reader
from wfm_core.data.readers import open_dataset


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
    reader = open_dataset(write_v2(tmp_path / "set"))
    assert isinstance(reader, LeRobotV2Reader) and len(reader) == 3
    check(reader)
    assert [reader[k].instruction for k in range(3)] == ["open it", "put it", "put it"]
    assert (reader[0].convention, reader[0].command_lag) == ("commanded", 1)
    check(LeRobotV2Reader(tmp_path / "set", camera=CAMERAS[1]), camera=1)


@pytest.mark.parametrize("encoder", AV1)
def test_videos_in_av1(tmp_path, encoder):
    root = write_v2(tmp_path / "set")
    for number, length in LENGTHS.items():
        path = root / f"videos/chunk-{number // 1000:03d}/{CAMERAS[0]}/episode_{number:06d}.mp4"
        path.write_bytes(encode_av1(grey_frames(length, number % 3), encoder))
    for episode, (number, length) in zip(open_dataset(root), LENGTHS.items(), strict=True):
        assert np.abs(episode.frames.astype(int) - grey_frames(length, number % 3)).max() <= 3


def test_frames_that_are_images_in_the_table(tmp_path):
    root = write_v2(tmp_path / "set", images=True)
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
    root = write_v2(tmp_path / "set", {"action": "delta", "observation.state": "eef"})
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


def test_versions_empty_instructions_and_axes_of_wrong_names(tmp_path):
    root = write_v2(tmp_path / "set")
    info = json.loads((root / "meta" / "info.json").read_text()) | {"codebase_version": "v2.0"}
    for name, dims in (("observation.state", 8), ("action", 7)):
        info["features"][name]["names"] = [f"joint_{k}" for k in range(dims)]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    lines = [{"episode_index": k, "tasks": [""], "length": n} for k, n in LENGTHS.items()]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = open_dataset(root)
    check(reader)
    assert [reader[k].instruction for k in range(3)] == ["", "", ""]  # whatever task_index says


def test_damage_names_the_file(tmp_path):
    root = write_v2(tmp_path / "set")
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
