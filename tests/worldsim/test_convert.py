"""worldsim-convert: any format in, LeRobot v3.0 out, through kills, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from bridge_files import NEW, OLD, plain_frames, some_actions, some_poses, write_raw

from wfm_core.data.actions import relabel
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.files import DataError
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import encode_video
from worldsim import recording
from worldsim.commands.convert import ConvertConfig, run

ROOT = Path(__file__).parents[2]


def convert(data: Path, out: Path, **changes) -> ConvertConfig:
    return ConvertConfig(data=str(data), out=str(out), **{"workers": 0} | changes)


@pytest.fixture
def raw(tmp_path):
    return write_raw(tmp_path / "raw")


def test_what_was_read_is_what_is_written(raw, tmp_path, capsys):
    run(convert(raw, tmp_path / "set"))
    assert f"2 episodes, 18 frames in {tmp_path / 'set'}" in capsys.readouterr().out
    source, made = open_dataset(raw), open_dataset(tmp_path / "set")
    for before, after in zip(source, made, strict=True):
        for name in ("instruction", "episode_id", "convention", "command_lag", "meta"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("frames", "actions", "agent_pos"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert [made[k].command_lag for k in range(2)] == [1, 0]  # each its own
    with pytest.raises(ValueError, match="worldsim-convert relabel=true makes them alike"):
        build_clip_cache(made, tmp_path / "mixed")


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
