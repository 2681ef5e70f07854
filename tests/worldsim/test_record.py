"""worldsim-record: what it plans, and that neither a kill nor a second start loses, doubles or changes an episode."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from tasks import TASKS  # noqa: E402
from tasks.camera import CAMERAS, THIRD_PERSON, WRIST, Camera  # noqa: E402
from wfm_core.data.camera_rays import unpack_pose  # noqa: E402
from wfm_core.data.lerobot_v3 import LeRobotV3Reader  # noqa: E402
from worldsim import recording  # noqa: E402
from worldsim.commands.record import RecordConfig, plan_episode, record_episode, run  # noqa: E402

ROOT = Path(__file__).parents[2]


def small(out: Path, **changes) -> RecordConfig:
    """Three short episodes: standing still is noticed after 4 steps."""
    settings = {
        "tasks": ["reach_target", "push_cube"], "behaviours": {"idle": 1.0}, "num_episodes": 3,
        "noise": [0.0, 0.0], "still_steps": 4, "workers": 0,
    }  # fmt: skip
    return RecordConfig(out=str(out), **settings | changes)


@pytest.fixture(scope="module")
def opengl():
    try:
        record_episode(small(Path("unused")), 0)
    except RuntimeError as error:
        pytest.skip(str(error))


def assert_recorded(out: Path, config: RecordConfig) -> None:
    """The data set holds exactly the planned episodes, bit for bit."""
    reader = LeRobotV3Reader(out)
    assert len(reader) == config.num_episodes
    for index in range(config.num_episodes):
        read, expected = reader[index], record_episode(config, index)
        assert (read.episode_id, read.instruction, read.meta) == (
            expected.episode_id,
            expected.instruction,
            expected.meta,
        )
        assert (read.convention, read.command_lag) == (expected.convention, expected.command_lag)
        np.testing.assert_array_equal(read.frames, expected.frames)
        np.testing.assert_array_equal(read.actions, expected.actions)
        np.testing.assert_array_equal(read.agent_pos, expected.agent_pos)
        assert read.labels.keys() == expected.labels.keys()
        for name, label in expected.labels.items():
            np.testing.assert_array_equal(read.labels[name], label)
        for name, frames in expected.views.items():
            view = LeRobotV3Reader(out, camera=f"observation.images.{name}")
            np.testing.assert_array_equal(view[index].frames, frames)


def test_the_plan_is_a_pure_function_of_settings_and_index():
    config = RecordConfig(seed=4)
    assert plan_episode(config, 7) == plan_episode(RecordConfig(seed=4, workers=9, out="elsewhere"), 7)
    assert plan_episode(config, 7) != plan_episode(config, 7 + len(TASKS))
    assert plan_episode(config, 7) != plan_episode(RecordConfig(seed=5), 7)


def test_the_plan_follows_its_dials():
    config = RecordConfig(behaviours={"expert": 3, "idle": 1}, noise=[0.1, 0.3], random_layouts=0.25, jitter=0.002)
    plans = [plan_episode(config, index) for index in range(600)]
    assert set(Counter(plan.task for plan in plans).values()) == {100}
    assert Counter(plan.behaviour for plan in plans)["expert"] / 600 == pytest.approx(0.75, abs=0.06)
    assert 0.1 <= min(plan.noise for plan in plans) < 0.12 < 0.28 < max(plan.noise for plan in plans) <= 0.3
    assert np.mean([plan.initial_state == -1 for plan in plans]) == pytest.approx(0.25, abs=0.06)
    assert {plan.initial_state for plan in plans} == set(range(-1, 24))
    for plan in plans:
        if plan.initial_state >= 0:
            for name, pose in TASKS[plan.task].initial_states[plan.initial_state].items():
                assert (
                    np.hypot(plan.layout[name].x - pose.x, plan.layout[name].y - pose.y) <= 1.5 * 0.002 * 2**0.5 + 1e-9
                )
    assert len({plan.seed for plan in plans}) == 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["juggle"]}, "tasks must be among reach_target.*got juggle"),
        ({"behaviours": {"dance": 1}}, "behaviours must be among expert.*or policies.*'dance'"),
        ({"behaviours": {"idle": 0}}, "some > 0"),
        ({"behaviours": {"idle": "much"}}, "behaviours must be names with weights.*much"),
        ({"behaviours": ["idle"]}, "behaviours must be names with weights.*idle"),
        ({"encoding": "gif"}, "encoding must be among lossless, compact, got gif"),
        ({"noise": [0.5, 0.1]}, "noise must be a range"),
        ({"random_layouts": 1.5}, r"random_layouts must be in \[0, 1\], got 1.5"),
        ({"num_episodes": 0}, "num_episodes must be >= 1, got 0"),
        ({"cameras": ["third_person", "elbow"]}, "cameras must be among third_person, wrist, got elbow"),
        ({"cameras": ["wrist"]}, r"cameras must name third_person, and none twice, got \['wrist'\]"),
        ({"cameras": ["third_person", "wrist", "wrist"]}, "and none twice"),
        ({"camera_motion": -0.1}, r"camera_motion must be in \[0, 2\], got -0.1"),
        ({"camera_motion": float("nan")}, r"camera_motion must be in \[0, 2\], got nan"),
        ({"factors": ["fog"]}, "factors must be among .*camera.*got fog"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecordConfig(**changes)


def test_recorded_and_read_back_is_identical(tmp_path, opengl, capsys):
    config = small(tmp_path / "set", behaviours={"expert": 1.0}, num_episodes=2, factors=["light"])
    run(config)
    assert_recorded(tmp_path / "set", config)
    printed = capsys.readouterr().out
    assert "2 episodes" in printed and str(tmp_path / "set") in printed and "push_cube" in printed
    assert not (tmp_path / "set" / ".staging").exists()


def test_an_expert_episode_ends_a_little_after_success(opengl):
    config = RecordConfig(tasks=["reach_target"], behaviours={"expert": 1.0}, noise=[0.0, 0.0], settle_steps=3)
    episode = record_episode(config, 0)
    success = episode.labels["success"]
    assert episode.meta["solved"] and success[-6:].all() and not success[:-6].any()  # 3 to hold, 3 to settle
    assert len(episode.actions) < TASKS["reach_target"].max_episode_steps
    np.testing.assert_array_equal(episode.labels["reward.success"], success.astype(np.float32))


def test_a_policy_acts_on_what_it_sees(opengl):
    """The scripted policy sees frames alone: its episode differs from the state-based expert's, and is solved."""
    settings = {"tasks": ["reach_target"], "random_layouts": 0.0, "num_episodes": 1}
    quiet, noisy = (
        record_episode(RecordConfig(behaviours={"scripted": 1.0}, noise=[dial, dial], **settings), 0)
        for dial in (0.0, 0.5)
    )
    assert quiet.meta["solved"] and quiet.meta["policy"] == "scripted" and quiet.meta["behaviour"] == "scripted"
    expert = record_episode(RecordConfig(behaviours={"expert": 1.0}, noise=[0.0, 0.0], **settings), 0)
    np.testing.assert_array_equal(quiet.frames[0], expert.frames[0])
    assert not np.array_equal(quiet.actions[:5], expert.actions[:5])
    assert not np.allclose(quiet.actions[:5], noisy.actions[:5])


def test_labels_tell_what_is_where(opengl):
    config = RecordConfig(tasks=["push_cube"], behaviours={"idle": 1.0}, noise=[0.0, 0.0], still_steps=0)
    episode = record_episode(config, 0)
    assert len(episode.actions) == TASKS["push_cube"].max_episode_steps  # still_steps=0: on to the horizon
    longer = record_episode(replace(config, max_steps=len(episode.actions) + 5), 0)
    assert len(longer.frames) == len(episode.frames) + 5
    np.testing.assert_array_equal(longer.frames[:-5], episode.frames)
    layout = json.loads(episode.meta["layout"])
    cube, disc = episode.labels["object_positions"][0].reshape(-1, 3)
    assert episode.meta["objects"] == "red_cube,disc"
    np.testing.assert_allclose(cube[:2], [layout["red_cube"]["x"], layout["red_cube"]["y"]], atol=2e-3)
    np.testing.assert_allclose(disc[:2], [layout["disc"]["x"], layout["disc"]["y"]], atol=2e-3)
    assert (episode.labels["grasped"] == -1).all() and not episode.meta["solved"]


FILMED = {"cameras": [THIRD_PERSON, WRIST], "camera_motion": 1.0}


def camera_of(episode, name: str, step: int) -> Camera:
    """The camera that the labels tell of."""
    rotation, position = unpack_pose(episode.labels[f"camera.{name}"][step])
    focal = episode.labels[f"focal.{name}"][step]
    assert focal[0] * 640 == pytest.approx(focal[1] * 480)  # square pixels
    return Camera(tuple(position), tuple(rotation[:, 2]), tuple(-rotation[:, 1]), focal=float(focal[0] * 640))


@pytest.mark.parametrize("behaviour", ["expert", "scripted"])
def test_an_episode_is_the_same_whatever_films_it(opengl, behaviour):
    """The expert looks at states and the other policy at the fixed camera, whoever else looks on."""
    plain = RecordConfig(tasks=["put_carrot_on_plate"], behaviours={behaviour: 1.0}, seed=3, max_steps=25)
    wrist, moving = replace(plain, cameras=FILMED["cameras"]), replace(plain, camera_motion=1.0)
    episode, with_wrist, moved, both = (
        record_episode(config, 0) for config in (plain, wrist, moving, replace(plain, **FILMED))
    )
    for other in (with_wrist, moved, both):
        np.testing.assert_array_equal(other.actions, episode.actions)
        np.testing.assert_array_equal(other.agent_pos, episode.agent_pos)
        assert other.meta == episode.meta
        for name, label in episode.labels.items():
            np.testing.assert_array_equal(other.labels[name], label)
    np.testing.assert_array_equal(with_wrist.frames, episode.frames)
    np.testing.assert_array_equal(both.frames, moved.frames)
    np.testing.assert_array_equal(both.views["wrist"], with_wrist.views["wrist"])
    assert np.abs(moved.frames.astype(int) - episode.frames).mean() > 5
    assert not episode.views and not any(name.startswith(("camera.", "focal.")) for name in episode.labels)


def test_recorded_poses_say_what_the_frames_show(opengl):
    """The red cube is where the cameras' projections say, in both views of every frame that shows it."""
    config = RecordConfig(tasks=["push_cube"], behaviours={"expert": 1.0}, noise=[0.0, 0.0], max_steps=14, **FILMED)
    episode = record_episode(config, 0)
    fixed = CAMERAS["table"]
    seen = {THIRD_PERSON: 0, WRIST: 0}
    for name, frames in {THIRD_PERSON: episode.frames, **episode.views}.items():
        assert episode.labels[f"camera.{name}"].shape == (15, 12)
        for step, frame in enumerate(frames.astype(int)):
            red = (frame[..., 0] > 110) & (frame[..., 1:].max(-1) < 60)
            border = red[[0, -1]].any() or red[:, [0, -1]].any()
            if red.sum() < 20 or border:
                continue  # hidden by the gripper, or cut off
            seen[name] += 1
            rows, columns = np.nonzero(red)
            found = (np.array([columns.mean(), rows.mean()]) + 0.5) / 128
            cube = episode.labels["object_positions"][step, :3]
            assert np.abs(camera_of(episode, name, step).project(cube) - found).max() < 0.07
            if name == THIRD_PERSON:
                assert np.abs(fixed.project(cube) - found).max() > 1e-3
    assert seen[THIRD_PERSON] >= 12 and seen[WRIST] >= 4
    places = episode.labels["camera.third_person"][:, 9:]
    assert (np.linalg.norm(np.diff(places, axis=0), axis=1) > 1e-4).all()  # it never rests
    tips = [camera_of(episode, WRIST, k).project(episode.agent_pos[k, :3]) for k in range(15)]
    np.testing.assert_allclose(tips, tips[:1] * 15, atol=1e-4)  # fixed to the gripper


def test_two_cameras_are_recorded_alike_by_any_number_of_workers(tmp_path, opengl):
    for workers in (0, 2):
        run(small(tmp_path / str(workers), workers=workers, **FILMED))
    assert_recorded(tmp_path / "0", small(tmp_path / "0", **FILMED))
    files = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*") if path.is_file())
    assert sum(path.suffix == ".mp4" for path in files) == 2
    for path in files:
        if path.name != "record.json" and path.suffix:
            assert (tmp_path / "0" / path).read_bytes() == (tmp_path / "2" / path).read_bytes()


def test_a_full_disk_keeps_what_is_recorded_and_the_next_start_goes_on(tmp_path, opengl, monkeypatch):
    config, real, made = small(tmp_path / "set"), recording.stage_episode, []

    def nearly_full(staging, index, *more):
        if len(made) == 2:
            raise OSError(28, f"could not write {staging}/episode-{index:06d}.mp4 (No space left on device)")
        made.append(index)
        real(staging, index, *more)

    monkeypatch.setattr(recording, "stage_episode", nearly_full)
    with pytest.raises(OSError, match=r"episode-000002\.mp4 \(No space left"):
        run(config)
    assert made == [0, 1] and not (tmp_path / "set" / "meta").exists()

    def rest(staging, index, *more):
        made.append(index)
        real(staging, index, *more)

    monkeypatch.setattr(recording, "stage_episode", rest)
    run(config)
    assert made == [0, 1, 2]
    assert_recorded(tmp_path / "set", config)

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.parquet")}
    run(config)  # finished: nothing is recorded or written again
    assert made == [0, 1, 2] and files == {path: path.stat().st_mtime_ns for path in files}


def test_another_recording_is_not_mixed_in(tmp_path, opengl):
    run(small(tmp_path / "set", num_episodes=1))
    with pytest.raises(ValueError, match=r"begun with other settings \(num_episodes: 1, now 2, seed: 0, now 9\)"):
        run(small(tmp_path / "set", num_episodes=2, seed=9))
    path = tmp_path / "set" / "record.json"
    settings = json.loads(path.read_text())
    del settings["max_steps"]  # as if begun before there was such a setting, which is then as it is if nobody sets it
    path.write_text(json.dumps(settings))
    run(small(tmp_path / "set", num_episodes=1))
    with pytest.raises(ValueError, match=r"begun with other settings \(max_steps: 0, now 7\)"):
        run(small(tmp_path / "set", num_episodes=1, max_steps=7))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="new or empty folder.*foreign"):
        run(small(tmp_path / "foreign"))


def test_two_recordings_at_once_are_refused(tmp_path):
    claim = tmp_path / "set", "record", {"seed": 1}, {}
    with (
        recording.claimed(*claim),
        pytest.raises(ValueError, match="is in use by another process"),
        recording.claimed(*claim),
    ):
        pass


def test_killed_and_started_again_from_the_command_line(tmp_path, opengl):
    config = small(tmp_path / "set", num_episodes=6, still_steps=30)
    arguments = [sys.executable, "-m", "worldsim.commands.record", f"out={config.out}", "num_episodes=6"]
    arguments += ["tasks=[reach_target,push_cube]", "behaviours={idle: 1.0}", "noise=[0.0,0.0]", "still_steps=30"]
    killed = subprocess.Popen([*arguments, "workers=1"], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "set").glob(".staging/episode-*.npz")):
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    killed.kill()  # the command, not its worker
    killed.wait()
    time.sleep(1)
    staged = len(list((tmp_path / "set").glob(".staging/episode-*.npz")))
    time.sleep(1)
    assert staged == len(list((tmp_path / "set").glob(".staging/episode-*.npz"))), "its worker goes on"
    assert 0 < staged < 6 and not (tmp_path / "set" / "meta").exists()
    again = subprocess.run([*arguments, "workers=0"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "6 episodes" in again.stdout
    assert "Traceback" not in again.stderr
    assert_recorded(tmp_path / "set", config)
