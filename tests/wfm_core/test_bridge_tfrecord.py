"""BridgeData V2 as processed into TFRecords of tensors."""

import numpy as np
import pytest
from clip_files import smooth_frames, some_actions, some_poses
from record_files import example, tensor, tensor_features, write_rlds, write_tensors

from wfm_core.data.bridge_tfrecord import BridgeTfrecordReader, parse_tensor
from wfm_core.data.files import DataError
from wfm_core.data.readers import open_dataset
from wfm_core.data.rlds import RldsReader
from wfm_core.data.tfrecord import record_offsets, write_records


@pytest.fixture
def tensors(tmp_path):
    return write_tensors(tmp_path)


def test_trajectories_of_tensors(tensors):
    reader = open_dataset(tensors)
    assert isinstance(reader, BridgeTfrecordReader) and len(reader) == 3
    for k, steps in ((2, 5), (0, 3), (1, 4)):
        episode = reader[k]
        np.testing.assert_array_equal(episode.frames, smooth_frames(steps + 1, k))  # with the one after the last action
        np.testing.assert_array_equal(episode.agent_pos, some_poses(steps + 1))
        np.testing.assert_array_equal(episode.actions, some_actions(steps))
        assert (episode.convention, episode.command_lag) == ("commanded", 1)
    assert [reader[k].instruction for k in range(3)] == ["fold it", "", ""]
    assert [reader[k].episode_id for k in range(3)] == [
        "icra/kitchen/train/out-00000", "icra/kitchen/train/out-00001", "icra/kitchen/val/out-00000"
    ]  # fmt: skip
    other = open_dataset(tensors, camera=1, split="val", command_lag=0)
    assert len(other) == 1 and other[0].command_lag == 0
    np.testing.assert_array_equal(other[0].frames, smooth_frames(6, 102))


def test_rlds_is_told_from_tensors_even_behind_damage(tensors, tmp_path_factory):
    assert isinstance(open_dataset(write_rlds(tmp_path_factory.mktemp("rlds"))), RldsReader)
    path = tensors / "icra" / "kitchen" / "train" / "out.tfrecord"
    content, (offset, _) = bytearray(path.read_bytes()), record_offsets(path)[0]
    content[offset + 30] ^= 1
    path.write_bytes(content)
    reader = open_dataset(tensors)
    assert isinstance(reader, BridgeTfrecordReader) and len(reader[1].actions) == 4
    with pytest.raises(DataError, match=rf"out\.tfrecord: the record at byte {offset} is damaged"):
        reader[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("actions", [b"\x0a\xff"], "actions is not a readable tensor"),
        ("actions", [], "actions is not a readable tensor"),
        ("actions", tensor(["no numbers"]), "actions must be numbers, got texts"),
        ("actions", tensor(some_actions(5)), "5 actions need 6 frames, got 4"),
        ("actions", tensor(np.zeros(3, bool)), r"its type is 10, must be 7 or one of \[1, 2, 3, 4, 9\]"),
        ("observations/images0", tensor(np.zeros((3, 32, 32, 3), np.float32)), "frames must be uint8"),
        ("observations/state", None, "feature 'observations/state' is missing; there are actions, language, next_obs"),
    ],
)
def test_damage_names_file_record_and_feature(tmp_path, name, value, message):
    features = {key: each for key, each in (tensor_features(3, 0, []) | {name: value}).items() if each is not None}
    write_records(tmp_path / "out.tfrecord", [example(tensor_features(3, 0, [])), example(features)])
    reader = BridgeTfrecordReader(tmp_path)
    assert len(reader[0].actions) == 3
    with pytest.raises(DataError, match=rf"out\.tfrecord, record 1: .*{message}"):
        reader[1]


def test_cameras_and_splits_that_are_not_there(tensors):
    with pytest.raises(DataError, match=r"feature 'next_observations/images7' is missing; there are .*images0, "):
        open_dataset(tensors, camera=7)[0]
    with pytest.raises(DataError, match=r"no test/\*\.tfrecord\* files"):
        open_dataset(tensors, split="test")


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.uint8, np.int64])
def test_tensors_of_every_type_keep_shape_and_type(kind):
    values = np.arange(6).reshape(1, 2, 3).astype(kind)
    read = parse_tensor({"x": tensor(values)}, "x")
    assert isinstance(read, np.ndarray) and read.dtype == kind
    np.testing.assert_array_equal(read, values)
    assert parse_tensor({"x": tensor(["a", "", "c"])}, "x") == [b"a", b"", b"c"]
    with pytest.raises(ValueError, match="x is not a readable tensor"):
        parse_tensor({"x": [tensor(values)[0][:-1]]}, "x")
