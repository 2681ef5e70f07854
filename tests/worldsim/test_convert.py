"""worldsim-convert: any format in, LeRobot v3.0 out, through kills, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from bridge_files import NEW, OLD, plain_frames, some_actions, some_poses, write_processed, write_raw
from clip_files import write_irasim, write_pairs
from lerobot_files import CAMERAS, write_nonstandard, write_v2
from record_files import write_rlds, write_tensors

from wfm_core.data.actions import relabel
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.data.files import DataError
from wfm_core.data.lerobot_v3 import LeRobotV3Reader
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import encode_video
from worldsim import recording
from worldsim.commands.convert import ConvertConfig, run

ROOT = Path(__file__).parents[2]


def convert(data: Path, out: Path, **changes) -> ConvertConfig:
    return ConvertConfig(data=str(data), out=str(out), **{"workers": 0} | changes)


def assert_same(source: Sequence[Episode], made: Sequence[Episode]) -> None:
    """Bit for bit, of the same types."""
    for before, after in zip(source, made, strict=True):
        for name in ("instruction", "episode_id", "convention", "command_lag", "meta"):
            assert getattr(before, name) == getattr(after, name)
        assert before.labels.keys() == after.labels.keys()
        pairs = [(getattr(before, name), getattr(after, name)) for name in ("frames", "actions", "agent_pos")]
        for a, b in pairs + [(before.labels[name], after.labels[name]) for name in before.labels]:
            if a is None:
                assert b is None
            else:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


def test_what_was_read_is_what_is_written(raw, tmp_path, capsys):
    run(convert(raw, tmp_path / "set"))
    assert f"2 episodes, 18 frames in {tmp_path / 'set'}" in capsys.readouterr().out
    made = open_dataset(tmp_path / "set")
    assert_same(open_dataset(raw), made)
    assert [made[k].command_lag for k in range(2)] == [1, 0]  # each its own
    with pytest.raises(ValueError, match="worldsim-convert relabel=true makes them alike"):
        build_clip_cache(made, tmp_path / "mixed")


FORMATS = {
    "processed": (write_processed, {"camera": 1}, 3),
    "tensors": (write_tensors, {"camera": 1}, 3),
    "rlds": (write_rlds, {"command_lag": 0}, 3),
    "irasim": (write_irasim, {"camera": 1}, 1),
    "pairs": (write_pairs, {}, 2),
    "lerobot_v2": (write_v2, {"camera": CAMERAS[1]}, 3),
    "nonstandard_v3": (
        partial(write_nonstandard, state_dim=8, videos=[[0, 1], [2, 3]]),
        {"camera": "observation.images.primary"},
        4,
    ),
}
"""Layout -> (its writer, options, number of episodes)."""


@pytest.mark.parametrize(("write", "options", "count"), FORMATS.values(), ids=FORMATS)
def test_every_format_is_converted_bit_for_bit(tmp_path, write, options, count):
    write(tmp_path / "data")
    run(convert(tmp_path / "data", tmp_path / "set", options=options))
    made = open_dataset(tmp_path / "set")
    assert isinstance(made, LeRobotV3Reader) and len(made) == count
    assert_same(open_dataset(tmp_path / "data", **options), made)


SEVERAL = {
    "raw": (write_raw, 0, 1),
    "irasim": (write_irasim, 0, 1),
    "lerobot_v2": (write_v2, *CAMERAS[:2]),
}
"""Layout -> (its writer, two of its cameras)."""


@pytest.mark.parametrize(("write", "first", "further"), SEVERAL.values(), ids=SEVERAL)
def test_what_further_cameras_saw_is_kept_if_asked_for(tmp_path, write, first, further):
    write(tmp_path / "data")
    run(convert(tmp_path / "data", tmp_path / "set", options={"camera": first, "views": {"wrist": further}}))
    made = open_dataset(tmp_path / "set", views={"wrist": "observation.images.wrist"})
    assert_same(open_dataset(tmp_path / "data", camera=first), made)
    for before, after in zip(open_dataset(tmp_path / "data", camera=further), made, strict=True):
        np.testing.assert_array_equal(before.frames, after.views["wrist"])
    assert made.fps == open_dataset(tmp_path / "data").fps


def test_the_frame_rate_stays_what_it_was(tmp_path):
    info = json.loads((write_v2(tmp_path / "data") / "meta" / "info.json").read_text())
    (tmp_path / "data" / "meta" / "info.json").write_text(json.dumps(info | {"fps": 10}))
    run(convert(tmp_path / "data", tmp_path / "set"))
    made = open_dataset(tmp_path / "set")
    assert made.fps == 10
    assert_same(open_dataset(tmp_path / "data"), made)
    written = json.loads((tmp_path / "set" / "meta" / "info.json").read_text())
    assert repr(written["fps"]) == "10" and written["features"]["observation.images.image_0"]["info"]["video.fps"] == 10
    rows = pq.read_table(next(tmp_path.glob("set/data/**/*.parquet")))
    np.testing.assert_allclose(rows["timestamp"].to_numpy(), rows["frame_index"].to_numpy() / 10, rtol=1e-6)
    with av.open(str(next(tmp_path.glob("set/videos/**/*.mp4")))) as video:
        assert video.streams.video[0].average_rate == 10


def test_size_actions_camera_and_number_as_asked_for(raw, tmp_path):
    run(convert(raw, tmp_path / "set", size=8, relabel=True, options={"camera": 1}, encoding="compact"))
    made = open_dataset(tmp_path / "set")
    assert [made[k].episode_id for k in range(2)] == [NEW, OLD]
    assert np.abs(made[0].frames.astype(int) - plain_frames(6, 1)[:, :8, :8]).max() < 8
    np.testing.assert_array_equal(made[0].actions, relabel(some_poses(6)))
    assert not np.allclose(made[0].actions, some_actions(5))
    assert {(each.convention, each.command_lag) for each in made} == {("relabelled", 0)}
    build_clip_cache(made, tmp_path / "alike")
    run(convert(raw, tmp_path / "one", num_episodes=1))
    assert len(open_dataset(tmp_path / "one")) == 1


def test_frames_are_squashed_and_not_cut(raw, tmp_path):
    frame = np.zeros((24, 32, 3), np.uint8)
    frame[:, :4, 0] = frame[:, -4:, 2] = 250
    for path in (raw / NEW / "images0").iterdir():
        cv2.imwrite(str(path), frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])
    run(convert(raw, tmp_path / "set", size=8, num_episodes=1))
    left, right = (open_dataset(tmp_path / "set")[0].frames[:, :, column].astype(int) for column in (0, 7))
    assert left.shape == (6, 8, 3) and (left[..., 0] > left[..., 2] + 150).all()
    assert (right[..., 2] > right[..., 0] + 150).all()


def test_a_second_start_goes_on_and_a_third_changes_nothing(raw, tmp_path, monkeypatch):
    made, real = [], recording.stage_episode

    def nearly_full(staging, index, *rest):
        if made == [0]:
            raise OSError(28, "could not write (No space left on device)")
        made.append(index)
        real(staging, index, *rest)

    monkeypatch.setattr(recording, "stage_episode", nearly_full)
    with pytest.raises(OSError, match="No space left"):
        run(convert(raw, tmp_path / "set"))
    made.append("again")
    run(convert(raw, tmp_path / "set"))
    run(convert(raw, tmp_path / "set", workers=3))
    assert made == [0, "again", 1] and len(open_dataset(tmp_path / "set")) == 2
    with pytest.raises(ValueError, match=r"begun with other settings \(relabel: False, now True, size: 0, now 8\)"):
        run(convert(raw, tmp_path / "set", size=8, relabel=True))


def test_what_cannot_be_converted_is_refused(raw, tmp_path):
    for changes, message in (
        ({"data": ""}, "data must be the folder of a data set, got nothing"),
        ({"encoding": "gif"}, "encoding must be among lossless, compact, got gif"),
        ({"size": -1}, "size must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ConvertConfig(**{"data": str(raw)} | changes)
    with pytest.raises(ValueError, match=r"options are not those of the reader of .*raw: .*'split'"):
        run(convert(raw, tmp_path / "set", options={"split": "train"}))
    (raw / NEW / "obs_dict.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"traj0/obs_dict\.pkl: not a readable.*; worldsim-curate leaves damaged"):
        run(convert(raw, tmp_path / "set"))
    (videos := tmp_path / "videos").mkdir()
    (videos / "a.mp4").write_bytes(encode_video(plain_frames(3), 5))
    with pytest.raises(ValueError, match=r"a data set of episodes needs actions, got frames only in a\.mp4"):
        run(convert(videos, tmp_path / "of_videos"))
    with pytest.raises(ValueError, match=r"relabel needs proprioception, got none in episode a\.mp4"):
        run(convert(videos, tmp_path / "relabelled", relabel=True))


def test_from_the_command_line_with_workers(raw, tmp_path):
    arguments = [f"data={raw}", f"out={tmp_path / 'set'}", "+options={camera: 1}", "size=16"]
    command = [sys.executable, "-m", "worldsim.commands.convert", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 episodes, 18 frames" in done.stdout
    assert open_dataset(tmp_path / "set")[1].frames.shape == (12, 16, 16, 3)
    wrong = subprocess.run([*command[:-1], "size=8"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and "worldsim-convert: " in wrong.stderr and "Traceback" not in wrong.stderr
