"""BridgeData V2 as recorded and as processed, and the pickles of both: traps of the layouts, and of unpickling."""

import os
import pickle

import cv2
import numpy as np
import pytest
from bridge_files import (
    NEW,
    plain_frames,
    processed_trajectory,
    some_actions,
    some_poses,
    write_processed,
    write_raw,
    write_trajectory,
)  # fmt: skip

from wfm_core.data.bridge_numpy import BridgeNumpyReader
from wfm_core.data.bridge_raw import BridgeRawReader
from wfm_core.data.files import DataError
from wfm_core.data.pickles import load_object_array, load_pickle, object_array_shape
from wfm_core.data.readers import open_dataset


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "bridge_data_v2")


# --- as recorded ------------------------------------------------------------------------------------------------------


def test_raw_trajectories(raw):
    reader = open_dataset(raw)
    assert isinstance(reader, BridgeRawReader) and len(reader) == 2  # the copy is left out
    episode = reader[0]
    assert np.abs(episode.frames.astype(int) - plain_frames(6)).max() < 4  # RGB, in the order of the numbers
    np.testing.assert_array_equal(episode.actions, some_actions(5))
    np.testing.assert_array_equal(episode.agent_pos, some_poses(6))
    assert (episode.instruction, episode.convention, episode.command_lag) == ("put it", "commanded", 1)
    assert episode.episode_id == NEW
    assert np.abs(open_dataset(raw, camera=1)[0].frames.astype(int) - plain_frames(6, 1)).max() < 4


def test_late_frames_of_old_recordings_are_put_right(raw):
    episode = open_dataset(raw)[1]
    assert np.abs(episode.frames.astype(int) - plain_frames(13, 10)[1:]).max() < 4  # ten and more come after nine
    np.testing.assert_array_equal(episode.agent_pos, some_poses(13)[1:])
    np.testing.assert_array_equal(episode.actions, some_actions(12)[:-1])
    assert (episode.instruction, episode.command_lag) == ("", 0)


def test_a_gripper_beyond_its_limits_is_kept_in_what_is_felt_and_cut_in_what_is_done(raw):
    poses = some_poses(6)
    poses[:, 6] = [0.5, 1.02, -0.01, 0.3, 1.0, 0.0]
    (raw / NEW / "obs_dict.pkl").write_bytes(pickle.dumps({"full_state": poses}))
    episode = open_dataset(raw)[0]
    np.testing.assert_array_equal(episode.agent_pos, poses)
    np.testing.assert_array_equal(episode.relabelled().actions[:, 6], np.float32([1, 0, 0.3, 1, 0]))


def test_depth_images_change_nothing(raw):
    before = open_dataset(raw)[0]
    (depth := raw / NEW / "depth_images0").mkdir()
    cv2.imwrite(str(depth / "im_0.png"), np.full((24, 32), 700, np.uint16))
    after = open_dataset(raw)[0]
    np.testing.assert_array_equal(before.frames, after.frames)
    assert not after.views and not after.labels


@pytest.mark.parametrize("day, late", [("2021-07-22_23-59-59", True), ("2021-07-23_00-00-00", False)])
def test_the_day_on_which_recordings_were_mended(tmp_path, day, late):
    write_trajectory(tmp_path / "2020-01-01_00-00-00" / day / "raw" / "traj_group0" / "traj0")  # the nearest one counts
    assert len(BridgeRawReader(tmp_path)[0].frames) == (5 if late else 6)


def test_raw_damage_names_the_file(raw):
    folder = raw / NEW
    with pytest.raises(DataError, match=r"images7: holds no im_\*\.jpg; the trajectory has images0, images1"):
        BridgeRawReader(raw, camera=7)[0]
    (folder / "images0" / "im_3.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"im_3\.jpg: missing, or not a readable image"):
        BridgeRawReader(raw)[0]
    (folder / "images0" / "im_3.jpg").unlink()
    with pytest.raises(DataError, match=r"im_3\.jpg: missing"):
        BridgeRawReader(raw)[0]
    (folder / "images0" / "im_5.jpg").rename(folder / "images0" / "im_3.jpg")
    with pytest.raises(DataError, match="has 5 frames, 6 states and 5 actions"):
        BridgeRawReader(raw)[0]
    (folder / "policy_out.pkl").write_bytes(pickle.dumps([{"moves": 1}]))
    with pytest.raises(DataError, match=r"policy_out\.pkl: has no readable actions \(KeyError\('actions'\)\)"):
        BridgeRawReader(raw)[0]
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps({"full_state": np.zeros((6, 8))}))
    with pytest.raises(DataError, match=r"full_state must be \(T \+ 1, 7\), got \(6, 8\)"):
        BridgeRawReader(raw)[0]
    with pytest.raises(DataError, match=r"no folders with obs_dict\.pkl or policy_out\.pkl"):
        BridgeRawReader(folder / "images0")


@pytest.mark.parametrize("name", ["policy_out.pkl", "obs_dict.pkl"])
def test_a_trajectory_that_lacks_a_pickle_is_not_passed_over(raw, name):
    (raw / NEW / name).unlink()
    reader = open_dataset(raw)
    assert len(reader) == 2 and len(reader[1].actions) == 11
    with pytest.raises(DataError, match=rf"traj0/{name}: not a readable pickle .*No such file"):
        reader[0]


def test_only_one_kind_of_pickle_is_still_recognised(tmp_path):
    write_trajectory(tmp_path / NEW)
    (tmp_path / NEW / "obs_dict.pkl").unlink()
    assert isinstance(open_dataset(tmp_path), BridgeRawReader)


def test_a_trajectory_without_a_date_is_refused(tmp_path):
    write_trajectory(tmp_path / "traj_group0" / "traj0")
    with pytest.raises(DataError, match="lies in no folder named YYYY-mm-dd_HH-MM-SS"):
        BridgeRawReader(tmp_path)[0]


# --- as processed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def processed(tmp_path):
    return write_processed(tmp_path)


def test_processed_trajectories(processed):
    reader = open_dataset(processed)
    assert isinstance(reader, BridgeNumpyReader) and len(reader) == 3
    for k, steps in ((2, 5), (0, 3), (1, 4)):
        episode = reader[k]
        np.testing.assert_array_equal(episode.frames, plain_frames(steps + 1, k))  # with the one after the last action
        np.testing.assert_array_equal(episode.agent_pos, some_poses(steps + 1))
        np.testing.assert_array_equal(episode.actions, some_actions(steps))
        assert (episode.convention, episode.command_lag) == ("commanded", 1)
    assert [reader[k].instruction for k in range(3)] == ["fold it", "", ""]
    assert [reader[k].episode_id for k in range(3)] == [
        "icra/kitchen/train-00000", "icra/kitchen/train-00001", "icra/kitchen/val-00000"
    ]  # fmt: skip
    assert len(open_dataset(processed, split="val")) == 1
    np.testing.assert_array_equal(open_dataset(processed, camera=1)[1].frames, plain_frames(5, 101))
    assert open_dataset(processed, command_lag=0)[0].command_lag == 0


def test_processed_damage_names_file_and_trajectory(processed):
    path = processed / "icra" / "kitchen" / "train" / "out.npy"
    np.save(path, np.array([processed_trajectory(3, 0, []), {"actions": []}], object), allow_pickle=True)
    BridgeNumpyReader(processed)[0]
    with pytest.raises(DataError, match=r"trajectory 0: not readable \(KeyError\('images2'\)\)"):
        BridgeNumpyReader(processed, camera=2)[0]
    with pytest.raises(DataError, match=r"train/out\.npy, trajectory 1: not readable \(KeyError\('observations'\)\)"):
        BridgeNumpyReader(processed)[1]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"train/out\.npy: not a readable array of objects"):
        BridgeNumpyReader(processed)[0]
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="holds float64, not objects"):
        BridgeNumpyReader(processed)
    with pytest.raises(DataError, match=r"no test/out\.npy files"):
        BridgeNumpyReader(processed, split="test")


# --- pickles ----------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, ("touch " + str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol_are_read(tmp_path, protocol):
    content = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": [np.float32(2), "text", b"\xff", None, True],
        "c": (1, {"d": 2.5}),
    }
    content["e"] = np.array(["x", None], object)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    read = load_pickle(tmp_path / "a.pkl")
    np.testing.assert_array_equal(read["a"], content["a"])
    assert read["b"] == content["b"] and read["c"] == content["c"] and list(read["e"]) == ["x", None]


def test_names_of_before_numpy_2_are_read(tmp_path):
    old = pickle.dumps({"a": np.arange(3), "b": np.float32(2)}, 2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core" in old and b"numpy._core" not in old
    (tmp_path / "a.pkl").write_bytes(old)
    assert load_pickle(tmp_path / "a.pkl")["b"] == 2


def test_nothing_else_is_run(tmp_path):
    Malicious.path = tmp_path / "was_here"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"full_state": Malicious()}))
    with pytest.raises(DataError, match=r"a\.pkl: not a readable pickle of arrays \(names posix\.system, only arrays"):
        load_pickle(tmp_path / "a.pkl")
    np.save(tmp_path / "a.npy", np.array([{"x": Malicious()}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy: not a readable array of objects \(names posix\.system"):
        load_object_array(tmp_path / "a.npy")
    for function in (eval, getattr, np.load, np.lib.format.read_array):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(function))
        with pytest.raises(DataError, match="only arrays are read"):
            load_pickle(tmp_path / "a.pkl")
    assert not (tmp_path / "was_here").exists()


class Call:
    """Pickled as a call of a function, and of what rebuilds an object if there is a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def disguised(size: int = 8) -> Call:
    """A type whose state says that it holds an object, and whose flags say that it does not."""
    fields = {"a": (np.dtype("O"), 0)}
    return Call(np.dtype, (f"V{size}", False, True), (3, "|", None, ("a",), fields, size, 1, 0))


REBUILD = np.zeros(1).__reduce__()[0]
BYTES = np.arange(2.0).__reduce_ex__(5)[0]
SCALAR = np.float64(1).__reduce__()[0]


@pytest.mark.parametrize(
    "forged",
    [
        Call(np.ndarray, ((1,), np.dtype("O"), bytes(8))),
        Call(REBUILD, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, bytes(8))),
        Call(REBUILD, (np.ndarray, (0,), b"b"), (1, (1,), disguised(), False, bytes(8))),
        Call(REBUILD, (np.ndarray, (0,), b"b"), (1, (170,), np.dtype("O"), False, [1, 2])),
        Call(REBUILD, (np.ndarray, (0,), b"b"), (1, (2,), np.dtype("f8"), False, bytes(8))),
        Call(BYTES, (bytes(8), np.dtype("O"), (1,), "C")),
        Call(BYTES, (bytes(8), disguised(), (1,), "C")),
        Call(BYTES, (np.arange(3.0), np.dtype("u1"), (24,), "C")),
        Call(SCALAR, (np.dtype("O"), bytes(8))),
        Call(SCALAR, (disguised(), bytes(8))),
        Call(np.dtype, ([("a", "O")], False, True)),
        Call(np.dtype, ("f8,O", False, True)),
    ],
)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_bytes_of_a_file_are_never_taken_for_pointers(tmp_path, forged, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([forged], protocol))
    with pytest.raises(DataError, match=r"a\.pkl: not a readable pickle of arrays"):
        load_pickle(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(np.array(["as", None, 3], object), protocol))
    assert list(load_pickle(tmp_path / "a.pkl")) == ["as", None, 3]  # of objects that are written out


def test_arrays_of_every_order_are_read(tmp_path):
    there = [np.arange(3, dtype=">i4"), np.array(["ä", "b"]), np.arange(6.0).reshape(2, 3).T, np.zeros((0, 2))]
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(there, protocol))
        for read, wanted in zip(load_pickle(tmp_path / "a.pkl"), there, strict=True):
            assert read.shape == wanted.shape and read.dtype.kind == wanted.dtype.kind
            np.testing.assert_array_equal(read, wanted)


def test_an_array_is_counted_by_its_header_and_held_to_it(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}, {}, {}], object), allow_pickle=True)
    assert object_array_shape(tmp_path / "a.npy") == (3,) == load_object_array(tmp_path / "a.npy").shape
    changed = (tmp_path / "a.npy").read_bytes().replace(b"(3,)", b"(2,)")
    (tmp_path / "a.npy").write_bytes(changed)
    with pytest.raises(DataError, match=r"its header says \(2,\), its content does not"):
        load_object_array(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"nowhere\.npy: not a readable array of objects"):
        object_array_shape(tmp_path / "nowhere.npy")
