"""Data sets in the LeRobot v3.0 layout: what is written is what is read, by us and by stock LeRobot."""

import json
from dataclasses import replace

import numpy as np
import pytest
from lerobot_files import AV1, encode_av1, grey_frames, make_episode, write_nonstandard

from wfm_core.data import lerobot_v3_writer
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import OWN_ACTIONS, Episode
from wfm_core.data.files import DataError
from wfm_core.data.lerobot_stats import IMAGE_STATS_EVERY
from wfm_core.data.lerobot_v3 import LeRobotV3Reader
from wfm_core.data.lerobot_v3_writer import assemble_dataset, stage_episode, staged_indices
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import ENCODINGS, encode_video

CAMERA = "observation.images.image_0"


def assert_same(a: Episode, b: Episode) -> None:
    for name in ("instruction", "episode_id", "convention", "command_lag", "meta"):
        assert getattr(a, name) == getattr(b, name)
    assert a.labels.keys() == b.labels.keys()
    pairs = [(a.frames, b.frames), (a.actions, b.actions), (a.agent_pos, b.agent_pos)]
    for x, y in pairs + [(a.labels[name], b.labels[name]) for name in a.labels]:
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


WRIST = "observation.images.wrist"


def with_wrist(episode: Episode, size: int = 16) -> Episode:
    """The same with a second camera, of smaller frames."""
    rng = np.random.default_rng(int(episode.frames[0, 0, 0, 0]))
    return replace(episode, views={"wrist": rng.integers(0, 256, (len(episode.frames), size, size, 3), dtype=np.uint8)})


@pytest.fixture
def two_cameras(tmp_path):
    episodes = [with_wrist(make_episode(k, steps=5 + k)) for k in range(3)]
    for k in (1, 2, 0):
        stage_episode(tmp_path / "staging", k, episodes[k])
    assemble_dataset(tmp_path / "staging", tmp_path / "two")
    return tmp_path / "two", episodes


@pytest.fixture
def dataset(tmp_path):
    episodes = [make_episode(k, steps=5 + k) for k in range(4)]
    for k in (2, 0, 3, 1):  # workers finish in any order
        stage_episode(tmp_path / "staging", k, episodes[k])
    assemble_dataset(tmp_path / "staging", tmp_path / "set")
    return tmp_path / "set", episodes


def test_read_back_is_identical_bit_for_bit(dataset):
    root, episodes = dataset
    reader = LeRobotV3Reader(root)
    assert len(reader) == 4
    for k in (3, 0, 2, 1):
        assert reader.length(k) == len(episodes[k].frames)
        assert_same(reader[k], episodes[k])


def test_many_video_and_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_v3_writer, "VIDEO_FILE_SECONDS", 3)  # 15 frames: two episodes of 7 a file
    monkeypatch.setattr(lerobot_v3_writer, "ROWS_PER_DATA_FILE", 22)
    monkeypatch.setattr(lerobot_v3_writer, "FILES_PER_CHUNK", 2)
    episodes = [make_episode(k) for k in range(7)]
    for k, episode in enumerate(episodes):
        stage_episode(tmp_path / "staging", k, episode)
    assemble_dataset(tmp_path / "staging", tmp_path / "set")
    videos = sorted(path.relative_to(tmp_path / "set" / "videos" / CAMERA) for path in tmp_path.glob("set/**/*.mp4"))
    assert [str(path) for path in videos] == [f"chunk-00{k // 2}/file-00{k % 2}.mp4" for k in range(4)]
    reader = LeRobotV3Reader(tmp_path / "set")
    for k, episode in enumerate(episodes):
        assert_same(reader[k], episode)


def test_each_camera_is_read_as_frames(two_cameras):
    root, episodes = two_cameras
    first, wrist = LeRobotV3Reader(root), LeRobotV3Reader(root, camera=WRIST)
    for k, episode in enumerate(episodes):
        assert_same(first[k], episode)
        assert_same(wrist[k], replace(episode, frames=episode.views["wrist"]))
        assert not first[k].views and first[k].meta == episode.meta


def test_cameras_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_v3_writer, "VIDEO_FILE_SECONDS", 3)  # 15 frames: two episodes of 7 a file
    episodes = [with_wrist(make_episode(k)) for k in range(5)]
    for k, episode in enumerate(episodes):
        stage_episode(tmp_path / "staging", k, episode)
    assemble_dataset(tmp_path / "staging", tmp_path / "set")
    for camera in (CAMERA, WRIST):
        assert len(list((tmp_path / "set" / "videos" / camera).rglob("*.mp4"))) == 3
    reader = LeRobotV3Reader(tmp_path / "set", camera=WRIST)
    for k, episode in enumerate(episodes):
        np.testing.assert_array_equal(reader[k].frames, episode.views["wrist"])


def test_episodes_of_other_cameras_are_refused(tmp_path):
    stage_episode(tmp_path / "staging", 0, with_wrist(make_episode(0)))
    stage_episode(tmp_path / "staging", 1, make_episode(1))
    with pytest.raises(DataError, match=r"episode-000001: .*frame sizes.*'wrist', \(16, 16, 3\)"):
        assemble_dataset(tmp_path / "staging", tmp_path / "set")
    stage_episode(tmp_path / "staging", 1, with_wrist(make_episode(1), size=32))
    with pytest.raises(DataError, match="episode-000001: .*frame sizes"):
        assemble_dataset(tmp_path / "staging", tmp_path / "set")
    stage_episode(tmp_path / "staging", 1, with_wrist(make_episode(1)))
    with pytest.raises(
        DataError, match=r"must not be called as the camera observation\.images\.wrist, got \['wrist'\]"
    ):
        assemble_dataset(tmp_path / "staging", tmp_path / "set", camera=WRIST)
    assert not (tmp_path / "set").exists()
    assemble_dataset(tmp_path / "staging", tmp_path / "set")
    assert len(LeRobotV3Reader(tmp_path / "set", camera=WRIST)) == 2


def test_a_kill_between_two_videos_leaves_no_episode(tmp_path, monkeypatch):
    real = lerobot_v3_writer.write_atomic

    def full_disk(path, content):
        if path.name == "episode-000000.wrist.mp4":
            raise OSError(28, f"could not write {path} (No space left on device)")
        real(path, content)

    monkeypatch.setattr(lerobot_v3_writer, "write_atomic", full_disk)
    with pytest.raises(OSError, match=r"wrist\.mp4"):
        stage_episode(tmp_path, 0, with_wrist(make_episode(0)))
    assert (tmp_path / "episode-000000.mp4").exists() and staged_indices(tmp_path) == []


def test_compact_encoding_loses_pixels_only(tmp_path):
    episode = make_episode(0)
    smooth = np.broadcast_to(np.linspace(40, 200, 32).astype(np.uint8)[None, :, None, None], episode.frames.shape)
    episode = Episode(**{**vars(episode), "frames": np.ascontiguousarray(smooth)})
    stage_episode(tmp_path / "staging", 0, episode, ENCODINGS["compact"])
    assemble_dataset(tmp_path / "staging", tmp_path / "set", encoding=ENCODINGS["compact"])
    read = LeRobotV3Reader(tmp_path / "set")[0]
    assert np.abs(read.frames.astype(int) - episode.frames).max() <= 6
    assert_same(Episode(**{**vars(read), "frames": episode.frames}), episode)


def test_stock_lerobot_reads_it(dataset):
    lerobot = pytest.importorskip("lerobot.datasets")
    root, episodes = dataset
    offsets = {CAMERA: [-0.2, 0.0], "action": [0.0, 0.2]}
    stock = lerobot.LeRobotDataset(
        "local/set", root=root, video_backend="pyav", return_uint8=True, delta_timestamps=offsets
    )
    assert (stock.num_episodes, stock.num_frames) == (4, sum(len(e.frames) for e in episodes))
    row = len(episodes[0].frames) + len(episodes[1].frames) + 3  # frame 3 of episode 2
    item = stock[row]
    np.testing.assert_array_equal(item[CAMERA].permute(0, 2, 3, 1).numpy(), episodes[2].frames[2:4])
    np.testing.assert_array_equal(item["action"].numpy(), episodes[2].actions[3:5])
    np.testing.assert_array_equal(item["observation.state"].numpy(), episodes[2].agent_pos[3])
    assert item["task"] == episodes[2].instruction
    assert item["reward.reach"].item() == episodes[2].labels["reward.reach"][3]
    assert stock.meta.filter_episodes(lambda episode: episode["seed"] == 2) == [2]
    assert stock.meta.features["action"]["info"]["convention"] == "commanded"

    states = np.concatenate([episode.agent_pos for episode in episodes])
    np.testing.assert_allclose(
        stock.meta.stats["observation.state"]["q99"], np.quantile(states.astype(np.float64), 0.99, axis=0)
    )
    np.testing.assert_allclose(stock.meta.stats["observation.state"]["std"], states.std(0), rtol=1e-5)
    sample = np.concatenate([episode.frames[::IMAGE_STATS_EVERY] for episode in episodes]) / 255
    for stat, value in {"mean": sample.mean((0, 1, 2)), "std": sample.std((0, 1, 2))}.items():
        np.testing.assert_allclose(stock.meta.stats[CAMERA][stat], value.reshape(3, 1, 1), rtol=1e-6)
    median = np.quantile(sample, 0.5, axis=(0, 1, 2)).reshape(3, 1, 1)
    np.testing.assert_allclose(stock.meta.stats[CAMERA]["q50"], median, atol=1 / 255)


def test_stock_lerobot_reads_every_camera(two_cameras):
    lerobot = pytest.importorskip("lerobot.datasets")
    root, episodes = two_cameras
    stock = lerobot.LeRobotDataset("local/two", root=root, video_backend="pyav", return_uint8=True)
    assert list(stock.meta.camera_keys) == [CAMERA, WRIST]
    item = stock[len(episodes[0].frames) + 2]  # frame 2 of episode 1
    np.testing.assert_array_equal(item[CAMERA].permute(1, 2, 0).numpy(), episodes[1].frames[2])
    np.testing.assert_array_equal(item[WRIST].permute(1, 2, 0).numpy(), episodes[1].views["wrist"][2])
    sample = np.concatenate([episode.views["wrist"][::IMAGE_STATS_EVERY] for episode in episodes]) / 255
    np.testing.assert_allclose(stock.meta.stats[WRIST]["mean"].ravel(), sample.mean((0, 1, 2)), rtol=1e-6)


def test_stock_lerobot_edits_it(dataset, tmp_path):
    lerobot = pytest.importorskip("lerobot.datasets")
    root, episodes = dataset
    stock = lerobot.LeRobotDataset("local/set", root=root, video_backend="pyav")
    lerobot.delete_episodes(stock, episode_indices=[0], output_dir=tmp_path / "fewer", repo_id="local/fewer")
    reader = LeRobotV3Reader(tmp_path / "fewer")
    assert len(reader) == 3 and (reader.convention, reader.command_lag) == ("commanded", 0)
    np.testing.assert_array_equal(reader[0].actions, episodes[1].actions)


def test_an_interrupted_stage_does_not_count(tmp_path):
    stage_episode(tmp_path, 0, make_episode(0))
    (tmp_path / "episode-000001.mp4").write_bytes(b"killed before the table was written")
    assert staged_indices(tmp_path) == [0]
    stage_episode(tmp_path, 1, make_episode(1))
    assert staged_indices(tmp_path) == [0, 1]


def test_an_interrupted_assembly_is_not_a_data_set_and_can_be_repeated(tmp_path, monkeypatch):
    stage_episode(tmp_path / "staging", 0, make_episode(0))
    real = lerobot_v3_writer.write_atomic

    def full_disk(path, content):
        if path.name == "stats.json":
            raise OSError(28, f"could not write {path} (No space left on device)")
        real(path, content)

    monkeypatch.setattr(lerobot_v3_writer, "write_atomic", full_disk)
    with pytest.raises(OSError, match=r"stats\.json"):
        assemble_dataset(tmp_path / "staging", tmp_path / "set")
    with pytest.raises(DataError, match=r"info\.json"):
        LeRobotV3Reader(tmp_path / "set")
    monkeypatch.undo()
    assemble_dataset(tmp_path / "staging", tmp_path / "set")
    assert_same(LeRobotV3Reader(tmp_path / "set")[0], make_episode(0))


def test_write_atomic_keeps_the_previous_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "table"
    lerobot_v3_writer.write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"table \(No space left on device\); the previous file is kept"):
        lerobot_v3_writer.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()

    def torn(file):
        file.write(b"ha")
        raise OSError("1000 requested and 2 written")  # as numpy says it

    with pytest.raises(OSError, match=r"array \(1000 requested and 2 written\); nothing is left of it"):
        lerobot_v3_writer.write_atomic(tmp_path / "array", torn)
    assert list(tmp_path.iterdir()) == [path]


def test_episodes_that_do_not_go_together_are_refused(tmp_path):
    stage_episode(tmp_path / "staging", 0, make_episode(0))
    stage_episode(tmp_path / "staging", 1, Episode(**{**vars(make_episode(1)), "convention": "relabelled"}))
    with pytest.raises(DataError, match="episode-000001: .*action convention must be those of episode-000000"):
        assemble_dataset(tmp_path / "staging", tmp_path / "set")


@pytest.mark.parametrize("state_dim", [7, 8])
@pytest.mark.parametrize("videos", [[[0], [1], [2], [3]], [[0, 1, 2, 3]], [[0, 1], [2, 3]]])
def test_nonstandard_copies(tmp_path, state_dim, videos):
    episodes = write_nonstandard(tmp_path, state_dim=state_dim, videos=videos)
    reader = LeRobotV3Reader(tmp_path, camera="observation.images.primary")
    for k, expected in enumerate(episodes):
        read = reader[k]
        np.testing.assert_array_equal(read.frames, expected.frames)
        np.testing.assert_array_equal(read.actions, expected.actions)
        np.testing.assert_array_equal(read.agent_pos, expected.agent_pos)
        assert (read.instruction, read.convention, read.command_lag) == ("a", "commanded", 1)
    with pytest.raises(ValueError, match=r"wrist.*primary.*got 'over_shoulder'"):
        LeRobotV3Reader(tmp_path, camera="over_shoulder")


def test_video_folders_by_chunk_and_then_by_camera(tmp_path):
    episodes = write_nonstandard(tmp_path, state_dim=7, videos=[[0, 1], [2, 3]])
    (chunk := tmp_path / "videos" / "chunk-000").mkdir()
    (tmp_path / "videos" / "observation.images.primary" / "chunk-000").rename(chunk / "observation.images.primary")
    (tmp_path / "videos" / "observation.images.primary").rmdir()
    (chunk / "observation.images.front").mkdir()
    (chunk / "observation.images.front" / "file-000.mp4").write_bytes(encode_video(episodes[0].frames[:2], 5))
    reader = LeRobotV3Reader(tmp_path, camera="observation.images.primary")
    for k, expected in enumerate(episodes):
        np.testing.assert_array_equal(reader[k].frames, expected.frames)


@pytest.mark.parametrize("encoder", AV1)
def test_joined_videos_in_av1(tmp_path, encoder):
    episodes = write_nonstandard(tmp_path, state_dim=7, videos=[[0, 1, 2], [3]])  # 5, 6, 7 and 8 frames
    folder = tmp_path / "videos" / "observation.images.primary" / "chunk-000"
    (folder / "file-000.mp4").write_bytes(encode_av1(grey_frames(18), encoder))
    (folder / "file-001.mp4").write_bytes(encode_av1(grey_frames(8, 18), encoder))
    reader, first = LeRobotV3Reader(tmp_path, camera="observation.images.primary"), 0
    for k, episode in enumerate(episodes):
        wanted = grey_frames(len(episode.frames), first)
        assert np.abs(reader[k].frames.astype(int) - wanted).max() <= 3
        first += len(wanted)


def test_too_few_video_frames_are_an_error(tmp_path):
    write_nonstandard(tmp_path, state_dim=7, videos=[[0, 1], [2]])
    with pytest.raises(DataError, match=r"file-001\.mp4.*the videos end before episode 3"):
        LeRobotV3Reader(tmp_path, camera="observation.images.primary")[0]


def test_missing_and_truncated_video_name_the_file(dataset):
    root, _ = dataset
    video = next(root.glob("videos/**/*.mp4"))
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"file-000\.mp4: cannot decode frame 0"):
        LeRobotV3Reader(root)[0]
    video.unlink()
    with pytest.raises(DataError, match=r"file-000\.mp4: the video is missing"):
        LeRobotV3Reader(root)[0]


def test_damaged_tables_name_the_file(dataset):
    root, _ = dataset
    (root / "data" / "chunk-000" / "file-000.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(DataError, match=r"data/chunk-000/file-000\.parquet"):
        LeRobotV3Reader(root)[0]


def test_other_versions_are_refused(dataset):
    root, _ = dataset
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v1.6"}))
    with pytest.raises(DataError, match=r"info\.json: LeRobot v1\.6, expected v3\.x"):
        LeRobotV3Reader(root)
    with pytest.raises(DataError, match=r"info\.json: LeRobot v1\.6, only v2\.x and v3\.x are read"):
        open_dataset(root)


def test_damaged_staged_episode_names_the_file(tmp_path):
    stage_episode(tmp_path / "staging", 0, make_episode(0))
    path = tmp_path / "staging" / "episode-000000.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"episode-000000\.npz"):
        assemble_dataset(tmp_path / "staging", tmp_path / "set")


def test_another_robots_actions_are_read_as_they_are_if_asked_for(tmp_path):
    joints = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    episode = replace(make_episode(0), actions=joints, convention=OWN_ACTIONS, agent_pos=None)
    stage_episode(tmp_path / "staging", 0, episode)
    assemble_dataset(tmp_path / "staging", tmp_path / "set")
    read = LeRobotV3Reader(tmp_path / "set")[0]
    assert read.agent_pos is None and read.convention == OWN_ACTIONS
    np.testing.assert_array_equal(read.actions, joints)
    cache = build_clip_cache([episode], tmp_path / "cache")
    np.testing.assert_array_equal(cache.columns["actions"], [*joints, joints[-1]])
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert info["features"]["action"]["names"] is None and not info["features"]["action"]["info"]["last_row_is_hold"]
    del info["features"]["action"]["info"]
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"7 dimensions, got \(3,\).*convention=own"):
        LeRobotV3Reader(tmp_path / "set")[0]
    assert LeRobotV3Reader(tmp_path / "set", convention="own")[0].actions.shape == (6, 3)
