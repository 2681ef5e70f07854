"""Readers of foreign formats, on fixtures written here; and on real samples where they lie beside the checkout."""

import json
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import smooth_frames, some_actions, some_poses, write_irasim, write_pairs
from record_files import example, field, rlds_features, varint, write_rlds

from wfm_core.data import actions as A
from wfm_core.data import video
from wfm_core.data.clip_pairs import ClipPairReader
from wfm_core.data.episode import UNKNOWN_ACTIONS
from wfm_core.data.files import DataError
from wfm_core.data.irasim import IrasimReader
from wfm_core.data.readers import READERS, open_dataset
from wfm_core.data.rlds import RldsReader
from wfm_core.data.tfrecord import crc32c, parse_example, read_record, record_offsets, write_records
from wfm_core.data.video import decode_video, encode_video
from wfm_core.data.video_folder import VideoFolderReader, square_frames

SAMPLES = Path(os.environ.get("WORLDSIM_SAMPLE_DATA", Path(__file__).parents[3] / "shared" / "data"))


# -- RLDS ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rlds(tmp_path):
    return write_rlds(tmp_path)


def test_rlds_episodes(rlds):
    reader = RldsReader(rlds)
    assert len(reader) == 3
    for seed in (2, 0, 1):
        episode, count = reader[seed], 5 + seed
        assert np.abs(episode.frames.astype(int) - smooth_frames(count, seed)).mean() < 3
        np.testing.assert_array_equal(episode.actions, some_actions(count)[:-1])  # no frame after the last action
        np.testing.assert_array_equal(episode.agent_pos, some_poses(count))
        np.testing.assert_array_equal(episode.labels["reward"], np.arange(count))
        assert list(episode.labels) == ["reward"] and len(episode.frames) == count  # no flag ends it before
        assert (episode.instruction, episode.convention, episode.command_lag) == (f"do {seed}", "commanded", 1)
    assert reader[-1].episode_id == reader[2].episode_id != reader[1].episode_id
    with pytest.raises(IndexError):
        reader[3]


def test_rlds_lag_and_convention_are_what_is_said(rlds):
    old = open_dataset(rlds, command_lag=0)[0]
    assert (old.convention, old.command_lag) == ("commanded", 0)
    reached = open_dataset(rlds, convention="relabelled", command_lag=0)[2]
    assert (reached.convention, reached.command_lag) == ("relabelled", 0)


def test_rlds_of_open_x_embodiment(tmp_path):
    features = rlds_features(5, 0)
    actions = features.pop("steps/action").reshape(5, 7)
    features["steps/action/world_vector"] = actions[:, :3].reshape(-1)
    features["steps/action/rotation_delta"] = actions[:, 3:6].reshape(-1)
    features["steps/action/open_gripper"] = np.array([1, 0, 0, 1, 1])
    features["steps/observation/image"] = features.pop("steps/observation/image_0")
    features["steps/observation/natural_language_instruction"] = features.pop("steps/language_instruction")
    write_records(tmp_path / "bridge-train.tfrecord-00000-of-00001", [example(features)])
    episode = RldsReader(tmp_path)[0]
    np.testing.assert_array_equal(episode.actions[:, :6], actions[:4, :6])
    np.testing.assert_array_equal(episode.actions[:, 6], [1, 0, 0, 1])
    assert episode.instruction == "do 0"


def test_rlds_camera_that_is_missing_or_unknown(rlds):
    with pytest.raises(DataError, match="record 0: all images are black"):
        RldsReader(rlds, camera="image_3")[0]
    with pytest.raises(DataError, match=r"camera must be one of \['image_0', 'image_3'\], got 'image_7'"):
        RldsReader(rlds, camera="image_7")[0]


def test_rlds_damage_names_file_and_record(rlds):
    path = rlds / "bridge-train.tfrecord-00000-of-00002"
    intact = path.read_bytes()
    offset, length = record_offsets(path)[1]
    path.write_bytes(intact[: offset + 50] + bytes([intact[offset + 50] ^ 1]) + intact[offset + 51 :])
    RldsReader(rlds)[0]
    with pytest.raises(DataError, match=f"00000-of-00002: the record at byte {offset} is damaged"):
        RldsReader(rlds)[1]
    path.write_bytes(intact[:-20])
    with pytest.raises(DataError, match="00000-of-00002: record 1 is cut off"):
        RldsReader(rlds)
    path.write_bytes(intact[: offset - 5] + b"\x07" + intact[offset - 4 :])
    with pytest.raises(DataError, match="00000-of-00002: the header of record 1 is damaged"):
        RldsReader(rlds)


def test_rlds_bad_image_names_record_and_frame(tmp_path):
    features = rlds_features(5, 0)
    features["steps/observation/image_0"][3] = b"no image"
    write_records(tmp_path / "a-train.tfrecord-00000-of-00001", [example(features)])
    with pytest.raises(DataError, match="tfrecord-00000-of-00001, record 0: frame 3 of image_0"):
        RldsReader(tmp_path)[0]


def test_rlds_split(rlds):
    write_records(rlds / "bridge-val.tfrecord-00000-of-00001", [example(rlds_features(4, 9))])
    assert [len(RldsReader(rlds, split=split)) for split in ("train", "val", None)] == [3, 1, 4]
    with pytest.raises(DataError, match=r"no \*-test\.tfrecord"):
        RldsReader(rlds, split="test")


def test_crc32c_known_values():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    data = np.random.default_rng(0).integers(0, 256, 200_001).astype(np.uint8).tobytes()
    crc, table = 0xFFFFFFFF, []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    assert crc32c(data) == crc ^ 0xFFFFFFFF  # the parallel lanes agree with the definition


def test_examples_unpacked_and_negative():
    floats = field(2, b"".join(b"\x0d" + struct.pack("<f", x) for x in (1.5, -2.0)))
    ints = field(3, b"".join(b"\x08" + varint(x) for x in (-3, 300)))
    entries = [field(1, field(1, name) + field(2, value)) for name, value in ((b"f", floats), (b"i", ints))]
    parsed = parse_example(field(1, b"".join(entries)))
    np.testing.assert_array_equal(parsed["f"], [1.5, -2.0])
    np.testing.assert_array_equal(parsed["i"], [-3, 300])
    with pytest.raises(DataError, match=r"not a tf\.train\.Example"):
        parse_example(b"\x0a\xff")


def test_a_short_read_is_damage(rlds):
    path = rlds / "bridge-train.tfrecord-00001-of-00002"
    (offset, length), size = record_offsets(path)[0], path.stat().st_size
    os.truncate(path, size - 2)
    with pytest.raises(DataError, match="damaged"):
        read_record(path, offset, length)


# -- mp4 + npz pairs -------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


def test_clip_pairs(pairs):
    reader = ClipPairReader(pairs)
    for k in range(2):
        episode = reader[k]
        np.testing.assert_array_equal(episode.frames, smooth_frames(6 + k, k))
        np.testing.assert_allclose(episode.actions, some_actions(6 + k)[:-1], atol=1e-6)
        assert episode.agent_pos is None and episode.episode_id == f"train/{k:09d}"
        assert (episode.convention, episode.command_lag) == ("commanded", 1)


def test_clip_pairs_damage_names_the_file(pairs):
    video, table = pairs / "train" / "000000000.mp4", pairs / "train" / "000000000.npz"
    intact = video.read_bytes()
    video.write_bytes(encode_video(smooth_frames(5), fps=20))
    with pytest.raises(DataError, match=r"000000000\.mp4: has 5 frames, its actions are 6"):
        ClipPairReader(pairs)[0]
    video.write_bytes(intact[: len(intact) * 2 // 3])
    with pytest.raises(DataError, match=r"000000000\.mp4: cannot decode frame"):
        ClipPairReader(pairs)[0]
    video.unlink()
    with pytest.raises(DataError, match=r"000000000\.mp4: the video is missing"):
        ClipPairReader(pairs)[0]
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(DataError, match=r"000000000\.npz: not a readable npz"):
        ClipPairReader(pairs)[0]


# -- IRASim / Cosmos -------------------------------------------------------------------------------------------------


@pytest.fixture
def irasim(tmp_path):
    return tmp_path, *write_irasim(tmp_path)


def test_irasim(irasim):
    root, poses, note = irasim
    episode = IrasimReader(root)[0]
    np.testing.assert_array_equal(episode.frames, smooth_frames(7))
    np.testing.assert_allclose(episode.agent_pos, poses, atol=1e-6)
    np.testing.assert_allclose(episode.actions, A.relabel(poses), atol=1e-5)
    # what it says agrees with the actions stored in the gripper frame, but for their gripper, which is open or closed
    stored = A.from_gripper_frame(np.array(note["action"]), poses)
    np.testing.assert_allclose(episode.actions[:, :6], stored[:, :6], atol=1e-5)
    assert {step[6] for step in note["action"]} == {0, 1} and not set(episode.actions[:, 6]) <= {0, 1}
    np.testing.assert_array_equal(IrasimReader(root, camera=1)[0].frames, smooth_frames(7, 1))
    assert (episode.instruction, episode.episode_id) == ("put the pot on the stove", "train/12")
    assert (episode.convention, episode.command_lag) == ("relabelled", 0)


def test_irasim_binary_gripper(irasim):
    root, poses, note = irasim
    del note["continuous_gripper_state"]
    (root / "annotation" / "train" / "12.json").write_text(json.dumps(note))
    np.testing.assert_array_equal(IrasimReader(root, split="train")[0].agent_pos[:, 6], poses[:, 6] > 0.5)


def test_the_variant_of_irasim_with_other_states_is_refused(irasim):
    root, _, note = irasim
    path = root / "annotation" / "train" / "12.json"
    note["states"] = note.pop("state")
    del note["continuous_gripper_state"]
    path.write_text(json.dumps(note))
    with pytest.raises(DataError, match=r"12\.json: .*has no `state`, only `states`.*convention is not documented; to"):
        open_dataset(root, camera=1)[0]
    del note["states"]
    path.write_text(json.dumps(note))
    with pytest.raises(DataError, match=r"12\.json: not a readable annotation \(KeyError: 'state'\)"):
        open_dataset(root)[0]


def test_irasim_damage_names_the_file(irasim):
    root, _, note = irasim
    path = root / "annotation" / "train" / "12.json"
    path.write_text(json.dumps(note)[:-9])
    with pytest.raises(DataError, match=r"12\.json: not a readable annotation"):
        IrasimReader(root)[0]
    path.write_text(json.dumps(note))
    with pytest.raises(DataError, match=r"12\.json: not a readable annotation \(IndexError"):
        IrasimReader(root, camera=2)[0]
    path.write_text(json.dumps({**note, "state": note["state"][:-1], "continuous_gripper_state": [0] * 6}))
    with pytest.raises(DataError, match=r"rgb\.mp4: has 7 frames, .*12\.json has 6 states"):
        IrasimReader(root)[0]
    (root / "videos" / "train" / "12" / "rgb.mp4").unlink()
    with pytest.raises(DataError, match=r"rgb\.mp4: the video is missing"):
        IrasimReader(root)[0]


# -- plain videos ----------------------------------------------------------------------------------------------------


def test_a_folder_of_videos(tmp_path):
    (tmp_path / "later").mkdir()
    wide = np.repeat(smooth_frames(5, 1, size=32), 2, axis=2)  # 32 x 64, each column twice
    (tmp_path / "later" / "wide.mp4").write_bytes(encode_video(wide, fps=15))
    (tmp_path / "a.mov").write_bytes(encode_video(smooth_frames(3, 2, size=16), fps=30))
    (tmp_path / "README.md").write_text("what these are")
    reader = open_dataset(tmp_path, size=16)
    assert isinstance(reader, VideoFolderReader) and len(reader) == 2
    small, large = reader
    np.testing.assert_array_equal(small.frames, smooth_frames(3, 2, size=16))  # of the size already: untouched
    middle = smooth_frames(5, 1, size=32)[:, :, 8:24].astype(float)  # what the crop leaves, 32 rows of 16 columns
    halved = (middle[:, ::2] + middle[:, 1::2]) / 2
    assert large.frames.shape == (5, 16, 16, 3) and np.abs(large.frames - halved).max() <= 1
    for episode, name in ((small, "a.mov"), (large, "later/wide.mp4")):
        assert episode.convention == UNKNOWN_ACTIONS and np.isnan(episode.actions).all()
        assert episode.agent_pos is None and (episode.instruction, episode.episode_id) == ("", name)
    assert open_dataset(tmp_path)[0].frames.shape == (3, 128, 128, 3)


def test_squares_are_cut_from_the_middle():
    frames = np.zeros((1, 4, 10, 3), np.uint8)
    frames[:, :, 3:7] = 200
    assert (square_frames(frames, 4) == 200).all() and (square_frames(frames, 8) == 200).all()
    np.testing.assert_array_equal(square_frames(frames.swapaxes(1, 2), 4), np.full((1, 4, 4, 3), 200))


def test_videos_that_are_none_or_part_of_something_else_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no videos \(\.mp4, "):
        VideoFolderReader(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.mp4: cannot decode frame 0"):
        open_dataset(tmp_path)[0]
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        open_dataset(tmp_path, size=0)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "stats.json").write_text("{}")  # LeRobot's, without its info.json
    with pytest.raises(DataError, match=r"stats\.json: plain videos have no tables .* damaged set"):
        open_dataset(tmp_path)


def test_a_video_that_holds_more_than_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bomb.mp4").write_bytes(encode_video(np.zeros((50, 64, 96, 3), np.uint8), fps=5))
    assert len(decode_video(tmp_path / "bomb.mp4")) == 50
    monkeypatch.setattr(video, "LARGEST", 20 * 64 * 96 * 3)
    assert len(decode_video(tmp_path / "bomb.mp4", num_frames=20)) == 20
    with pytest.raises(DataError, match=r"bomb\.mp4: more than .* GiB are needed for 50 frames, 96 x 64 each"):
        decode_video(tmp_path / "bomb.mp4")  # as its header says
    with av.open(str(tmp_path / "bomb.ts"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8))))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"bomb\.ts: more than .* GiB are needed for 21 frames, 96 x 64 each"):
        decode_video(tmp_path / "bomb.ts")  # whose header does not say


# -- recognition -----------------------------------------------------------------------------------------------------


def test_open_dataset_recognises_what_the_fixtures_wrote(rlds, tmp_path_factory, irasim):
    (folder := tmp_path_factory.mktemp("pairs") / "train").mkdir()
    np.savez(folder / "0.npz", np.zeros((3, 10)))
    (folder / "0.mp4").write_bytes(encode_video(smooth_frames(3), fps=20))
    assert isinstance(open_dataset(folder), ClipPairReader)
    assert isinstance(open_dataset(irasim[0]), IrasimReader)
    only_records = tmp_path_factory.mktemp("rlds") / "1.0.0"
    only_records.mkdir()
    write_records(only_records / "x-train.tfrecord-00000-of-00001", [example(rlds_features(5, 0))])
    assert open_dataset(only_records.parent, split="train")[0].instruction == "do 0"


def test_open_dataset_says_what_it_found(tmp_path):
    (tmp_path / "a.gif").touch()
    with pytest.raises(DataError, match=r"found 1 \.gif; known are lerobot .*clip_pairs.*video_folder \(.*/\*\.mp4, "):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere")
    formats = ["lerobot", "irasim", "tfrecord", "bridge_raw", "bridge_numpy", "clip_pairs", "video_folder"]
    assert list(READERS) == formats


# -- real samples ----------------------------------------------------------------------------------------------------

needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no real samples in {SAMPLES}")


@needs_samples
def test_real_clip_pairs():
    reader = open_dataset(SAMPLES / "bridge_clips")
    assert len(reader) == 10
    assert sum(len(episode.frames) for episode in reader) == 355
    for episode in reader:
        assert (np.abs(episode.actions[:, :3]) <= A.MAX_TRANSLATION + 1e-3).all()
        assert (np.abs(episode.actions[:, 3:6]) <= A.MAX_ROTATION + 1e-3).all()
        assert set(np.unique(episode.actions[:, 6])) <= {0.0, 1.0} and episode.actions[0, 6] == 1.0


@needs_samples
def test_real_videos():
    reader = open_dataset(SAMPLES / "bridge_videos", size=64)
    assert len(reader) == 20
    episode = reader[0]
    assert episode.frames.shape[1:] == (64, 64, 3) and len(episode.frames) == 39 and episode.frames.std() > 20


@needs_samples
def test_real_rlds():
    reader = open_dataset(SAMPLES / "bridge_rlds")
    assert len(reader) == 25
    for episode in reader:
        assert episode.frames.shape == (10, 64, 64, 3) and episode.instruction
        steps = np.diff(episode.agent_pos[:, :3], axis=0)
        assert np.abs(steps - episode.actions[:, :3]).mean() < 0.01  # metres: commands and motion agree in scale
    commands = np.concatenate([episode.actions[:, :3] for episode in reader]).ravel()
    motion = np.concatenate([np.diff(episode.agent_pos[:, :3], axis=0) for episode in reader]).ravel()
    assert np.corrcoef(commands, motion)[0, 1] > 0.7
