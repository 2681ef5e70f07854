"""worldsim-curate: what is kept and why, in whatever number of processes, through kills and poisonous files."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from robot_clips import frozen, robot_episode, shuffled, teleported, write_dataset

from wfm_core.curation.examine import Findings, _opened
from wfm_core.data.actions import relabel
from wfm_core.data.episode import OWN_ACTIONS
from wfm_core.data.files import DataError
from wfm_core.data.lerobot_v3_writer import assemble_dataset, stage_episode
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import encode_video
from worldsim import judging
from worldsim.commands import curate
from worldsim.commands.curate import CurateConfig, run
from worldsim.judging import success_probability
from worldsim.simulator import load_world_sim

ROOT = Path(__file__).parents[2]
REASONS = ["", "frozen", "teleport", "", "actions_do_not_fit_states", "", "duplicate"]


def write_set(folder, episodes):
    for k, episode in enumerate(episodes):
        stage_episode(folder.with_name(f"{folder.name}.staging"), k, episode)
    assemble_dataset(folder.with_name(f"{folder.name}.staging"), folder)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Three good episodes, three with faults, and a copy in a second set."""
    root, good = tmp_path_factory.mktemp("planted"), [robot_episode(seed) for seed in range(3)]
    faults = [frozen(robot_episode(3)), teleported(robot_episode(4)), shuffled(robot_episode(5))]
    write_set(root / "a", [good[0], *faults[:2], good[1]])
    write_set(root / "b", [faults[2], good[2], replace(good[1], episode_id="a copy")])
    return [str(root / "a"), str(root / "b")]


def config(data, out, **changes):
    return CurateConfig(data=data, out=str(out), **{"workers": 0} | changes)


def manifest(out):
    return pq.read_table(out / "manifest.parquet").to_pylist()


def same_files(one, other):
    def files(folder):
        found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}

    assert files(one).keys() == files(other).keys() and files(one) == files(other)


def test_every_episode_is_accounted_for(planted, tmp_path, capsys):
    run(config(planted, tmp_path / "out"))
    assert "3 of 7 episodes kept" in capsys.readouterr().out
    rows = manifest(tmp_path / "out")
    assert [row["reason"] for row in rows] == REASONS
    assert [row["kept"] for row in rows] == [not reason for reason in REASONS]
    assert [(Path(row["data"]).name, row["index"]) for row in rows] == [("a", k) for k in range(4)] + [
        ("b", k) for k in range(3)
    ]
    assert rows[2]["value"] == rows[2]["state_jump"] > 0.1 == rows[2]["high"] and rows[2]["low"] == -np.inf
    assert rows[6]["item"] == "a copy" and rows[6]["kept_instead"] == f"{planted[0]}[3]" and rows[6]["value"] == 0
    assert rows[0]["value"] is None and rows[0]["error"] == "" and rows[0]["num_frames"] == 25
    made = open_dataset(tmp_path / "out")
    assert [each.episode_id for each in made] == ["a/episode 0", "a/episode 1", "b/episode 2"]
    for each, seed in zip(made, range(3), strict=True):
        for name in ("frames", "actions", "agent_pos"):
            np.testing.assert_array_equal(getattr(each, name), getattr(robot_episode(seed), name))
        assert each.instruction == robot_episode(seed).instruction and each.meta == {"source": "ab"[seed > 1]}
    card = (tmp_path / "out" / "CARD.md").read_text()
    assert "3 of 7 episodes kept" in card and "| teleport | 1 | state_jump | [-inf, 0.1] |" in card
    assert "| duplicate | 1 |" in card and "| num_frames | 25 | 25 | 25 |" in card and "dark |" in card
    sheet, charts = (cv2.imread(str(tmp_path / "out" / f"{name}.png")) for name in ("contact", "histograms"))
    assert charts.shape == (600, 1200, 3) and charts.std() > 10
    assert sheet.shape == (5 * 112, 6 * 128, 3)  # kept, and four reasons
    kept = cv2.resize(robot_episode(0).frames[12], (128, 96), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(sheet[16:112, :128, ::-1], kept)


def test_a_frame_rate_is_kept_and_two_do_not_make_one_set(tmp_path):
    slow, fast = (str(write_set(tmp_path / name, [robot_episode(k)])) for k, name in enumerate(("slow", "fast")))
    info = tmp_path / "fast" / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fps": 10}))
    with pytest.raises(ValueError, match=r"must have one frame rate but have \[5\.0, 10\.0\]; curate them apart"):
        run(config([slow, fast], tmp_path / "both"))
    run(config([fast], tmp_path / "out"))
    assert open_dataset(tmp_path / "out").fps == 10


def test_settings_change_what_is_kept(planted, tmp_path):
    settings = {"rules": {"teleport": {"high": 0.5}, "frozen": {"high": 1.0}, "static": {"low": 0.0}}, "alike": -1.0}
    run(config(planted, tmp_path / "out", size=48, relabel=True, encoding="compact", **settings))
    assert [row["reason"] for row in manifest(tmp_path / "out")] == [
        "", "motion_does_not_fit_frames", "", "", "actions_do_not_fit_states", "", ""
    ]  # fmt: skip
    episode = open_dataset(tmp_path / "out")[0]
    assert episode.frames.shape[1:] == (48, 48, 3) and (episode.convention, episode.command_lag) == ("relabelled", 0)
    np.testing.assert_array_equal(episode.actions, relabel(robot_episode(0).agent_pos))


def test_processes_and_kills_change_nothing(planted, tmp_path):
    run(config(planted, tmp_path / "whole"))
    arguments = [sys.executable, "-m", "worldsim.commands.curate", f"data=[{','.join(planted)}]", "workers=2"]
    killed = subprocess.Popen([*arguments, f"out={tmp_path / 'cut'}"], cwd=ROOT, start_new_session=True)
    while not list((tmp_path / "cut").glob("examined/item-*.json")):
        assert killed.poll() is None, "it ended before it was killed"
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "cut" / "meta").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("examined/item-*.json")}
    subprocess.run([*arguments, f"out={tmp_path / 'cut'}"], cwd=ROOT, check=True, capture_output=True)
    same_files(tmp_path / "whole", tmp_path / "cut")
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())  # not examined again
    with pytest.raises(ValueError, match=r"begun with other settings \(alike: 0.007, now 0.5\)"):
        run(config(planted, tmp_path / "cut", alike=0.5))
    with pytest.raises(ValueError, match=r"begun with other settings \(rules: .*'dark', 'low': -inf, 'high': 0.2.*now"):
        run(config(planted, tmp_path / "cut", rules={"dark": {"high": 0.5}}))
    with pytest.raises(ValueError, match=r"begun with other settings \(data: .*, num_episodes: 7, now 4\)"):
        run(config(planted[:1], tmp_path / "cut"))


def test_poisonous_files_cost_their_episode_alone(tmp_path):
    (folder := tmp_path / "pairs").mkdir()
    for k in range(5):
        np.savez(folder / f"{k}.npz", arr_0=np.concatenate([robot_episode(k).actions, np.zeros((1, 7))]))
        (folder / f"{k}.mp4").write_bytes(encode_video(robot_episode(k).frames, 20))
    (folder / "1.mp4").write_bytes((folder / "1.mp4").read_bytes()[:2000])
    (folder / "2.mp4").write_bytes(b"")
    (folder / "3.npz").write_bytes(b"no zip")
    (folder / "4.mp4").write_bytes(encode_video(robot_episode(4).frames[:9], 20))
    run(config([str(folder)], tmp_path / "out", rules={"motion_does_not_fit_frames": {"low": -1}}))
    rows = manifest(tmp_path / "out")
    assert [row["reason"] for row in rows] == ["", *["unreadable"] * 4]
    for row, message in zip(
        rows[1:], ("1.mp4: cannot", "2.mp4: cannot", "3.npz: not a", "4.mp4: has 9 fr"), strict=True
    ):
        assert message in row["error"] and row["item"] == f"pairs[{row['index']}]"


def test_what_makes_no_sense_is_refused(planted, tmp_path):
    for changes, message in (
        ({"data": []}, r"data must be folders of data sets, got none"),
        ({"rules": {"fog": {}}}, "rules must be low or high of"),
        ({"encoding": "gif"}, "encoding must be among"),
        ({"kind": "pictures"}, "kind must be among episodes, video, got pictures"),
        ({"executor": "slurm"}, "executor must be among local, ray, got slurm"),
        ({"kind": "video", "rules": {"teleport": {}}}, "rules must be low or high of too_brief, .*, got teleport"),
        ({"workers": -1}, "workers must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CurateConfig(**{"data": planted} | changes)
    with pytest.raises(ValueError, match="nothing is kept of 7 episodes: 7 too_short; .*CARD.md and "):
        run(config(planted, tmp_path / "nothing", rules={"too_short": {"low": 99}}))
    assert {row["reason"] for row in manifest(tmp_path / "nothing")} == {"too_short"}
    assert "| too_short | 7 |" in (tmp_path / "nothing" / "CARD.md").read_text()
    other = write_set(tmp_path / "large", [robot_episode(7).resized(80, 96)])
    with pytest.raises(ValueError, match=r"one size but have \[\(64.0, 64.0\), \(80.0, 96.0\)\]; choose size=<pixels>"):
        run(config([*planted, str(other)], tmp_path / "sizes"))
    assert len(manifest(tmp_path / "sizes")) == 8
    found = {path: path.stat().st_mtime_ns for path in (tmp_path / "sizes").glob("examined/item-*.json")}
    run(config([*planted, str(other)], tmp_path / "sizes", size=64))  # in the same folder, out of what was found
    assert len(found) == 8 and all(path.stat().st_mtime_ns == when for path, when in found.items())
    assert len(open_dataset(tmp_path / "sizes")) == 4
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="out must be a new or empty folder, or one begun by worldsim-curate"):
        run(config(planted, tmp_path / "foreign"))
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
    told = write_set(tmp_path / "told", [replace(robot_episode(7), convention="relabelled")])
    with pytest.raises(ValueError, match=r"one convention but have \['commanded', 'relabelled'\]; choose relabel=true"):
        run(config([*planted, str(told)], tmp_path / "conventions"))
    numb = write_set(tmp_path / "numb", [replace(robot_episode(7), agent_pos=None)])
    with pytest.raises(ValueError, match="all episodes or none must have proprioception"):
        run(config([*planted, str(numb)], tmp_path / "states"))
    with pytest.raises(ValueError, match="relabel=true needs proprioception"):
        run(config([str(numb)], tmp_path / "relabelled", relabel=True))
    with pytest.raises(ValueError, match="out must not lie within data, got .*told/out in .*told"):
        run(config([str(told)], told / "out"))
    with pytest.raises(ValueError, match="encoding=compact needs an even size, got 47"):
        config(planted, tmp_path / "odd", encoding="compact", size=47)
    odd = write_set(tmp_path / "odd", [robot_episode(7).resized(75, 96)])
    with pytest.raises(ValueError, match=r"compact needs even sides but they are \[\(75.0, 96.0\)\]; choose size="):
        run(config([str(odd)], tmp_path / "uneven", encoding="compact"))


def test_what_cannot_be_one_set_is_said_before_it_is_made(tmp_path):
    score = np.arange(25)
    one, two = (
        write_set(tmp_path / name, [replace(robot_episode(k), labels={"score": score.astype(kind)})])
        for k, (name, kind) in enumerate([("one", np.float32), ("two", np.int64)])
    )
    with pytest.raises(ValueError, match=r"label score must be of one kind but is \['float32 \(\)', 'int64 \(\)'\]"):
        run(config([str(one), str(two)], tmp_path / "labels"))
    own = [replace(robot_episode(k), convention=OWN_ACTIONS, agent_pos=None) for k in range(2)]
    wide = replace(own[1], actions=np.tile(own[1].actions, 2))
    own, wide = write_set(tmp_path / "own", own[:1]), write_set(tmp_path / "wide", [wide])
    with pytest.raises(ValueError, match=r"as many dimensions but have \[7, 14\]; curate robots apart"):
        run(config([str(own), str(wide)], tmp_path / "dims", rules={"motion_does_not_fit_frames": {"low": -9}}))
    found = json.loads((tmp_path / "dims" / "examined" / "item-0000000.json").read_text())
    assert Findings(**{name: found[name] for name in found.keys() - {"label_kinds", "action_dim"}}).action_dim == 0


def test_findings_are_of_the_data_that_were_examined(tmp_path):
    (folder := tmp_path / "pairs").mkdir()
    for k in range(3):
        np.savez(folder / f"{k}.npz", arr_0=np.concatenate([robot_episode(k).actions, np.zeros((1, 7))]))
        (folder / f"{k}.mp4").write_bytes(encode_video(robot_episode(k).frames, 20))
    settings = {"rules": {"motion_does_not_fit_frames": {"low": -1}, "too_short": {"low": 99}}}
    with pytest.raises(ValueError, match="nothing is kept"):
        run(config([str(folder)], tmp_path / "out", **settings))
    for suffix in ("npz", "mp4"):
        (folder / f"0.{suffix}").rename(folder / f"3.{suffix}")  # as many as before, but others by number
    with pytest.raises(ValueError, match=r"the files in .*pairs must be as when .*examined was begun, but "):
        run(config([str(folder)], tmp_path / "out", **settings))
    begun = tmp_path / "out" / "examined" / "examine.json"
    old = {name: value for name, value in json.loads(begun.read_text()).items() if name != "listing"}
    begun.write_text(json.dumps(old))  # as if begun before this was looked at
    _opened.cache_clear()  # as in another process
    with pytest.raises(DataError, match=r"pairs\[0\] must be 0, as when it was examined, got 1; leave the data"):
        run(config([str(folder)], tmp_path / "out", rules={"motion_does_not_fit_frames": {"low": -1}}))


def test_what_a_kill_leaves_half_written_stops_nobody(planted, tmp_path):
    for place, name in ((tmp_path / "out", "curate"), (tmp_path / "out" / "examined", "examine")):
        place.mkdir()
        (place / f".{name}.json.123.tmp").write_text("{")
    run(config(planted, tmp_path / "out"))
    assert len(open_dataset(tmp_path / "out")) == 3 and not list((tmp_path / "out").rglob(".*.tmp"))


def test_the_card_names_cameras_that_are_left_out(tmp_path):
    both = [replace(robot_episode(k), views={"wrist": robot_episode(k).frames}) for k in range(2)]
    data = write_set(tmp_path / "both", both)
    run(config([str(data)], tmp_path / "out"))
    said = f"Left out of {data} are what observation.images.wrist saw."
    assert said in (tmp_path / "out" / "CARD.md").read_text() and open_dataset(tmp_path / "out")[0].views == {}
    run(config([str(data)], tmp_path / "wrist", options={"camera": "observation.images.wrist"}))
    assert "are what observation.images.image" in (tmp_path / "wrist" / "CARD.md").read_text()
    run(config([str(data)], tmp_path / "all", options={"views": {"wrist": "observation.images.wrist"}}))
    assert "Left out" not in (tmp_path / "all" / "CARD.md").read_text()
    for k, made in enumerate(open_dataset(tmp_path / "all", views={"wrist": "observation.images.wrist"})):
        np.testing.assert_array_equal(made.views["wrist"], both[k].views["wrist"])


def test_labels_that_all_have_are_kept(tmp_path):
    flags = np.arange(25) > 20
    one = write_set(tmp_path / "one", [replace(robot_episode(0), labels={"success": flags, "reward": flags * 1.0})])
    two = write_set(tmp_path / "two", [replace(robot_episode(1), labels={"success": ~flags})])
    run(config([str(one), str(two)], tmp_path / "out"))
    made = open_dataset(tmp_path / "out")
    assert [list(each.labels) for each in made] == [["success"], ["success"]]
    np.testing.assert_array_equal(made[1].labels["success"], ~flags)
    assert json.loads((tmp_path / "out" / "curate.json").read_text())["data"] == [str(one), str(two)]


def test_instructions_get_one_spelling_unless_they_are_to_stay(tmp_path):
    data = write_set(tmp_path / "set", [replace(robot_episode(0), instruction=' "Put it  DOWN." ')])
    run(config([str(data)], tmp_path / "one"))
    run(config([str(data)], tmp_path / "own", normalise=False))
    assert [open_dataset(tmp_path / name)[0].instruction for name in ("one", "own")] == [
        "put it down",
        ' "Put it  DOWN." ',
    ]


def test_success_is_labelled_by_who_is_asked(tiny_checkpoint, tmp_path):
    sim = load_world_sim(tiny_checkpoint)
    known, episodes = sim.heads.config.instructions[1], [robot_episode(seed) for seed in range(3)]
    episodes[0] = replace(episodes[0], instruction=known)
    data = write_dataset(tmp_path / "data", episodes)
    run(config([data], tmp_path / "out", success_by=str(tiny_checkpoint), size=48))
    made = open_dataset(tmp_path / "out")
    said = [episode.labels["success_probability"] for episode in made]
    assert [bool(np.isnan(each).all()) for each in said] == [False, True, True]
    small = episodes[0].resized(32, 32)
    expected = success_probability(sim, small.frames, small.agent_pos, small.actions, known)
    np.testing.assert_array_equal(said[0], expected)
    assert expected[0] == 0 and np.unique(expected).size > 5 and made[0].frames.shape[1:] == (48, 48, 3)


def test_who_judges_success_uses_one_thread(monkeypatch, tmp_path):
    class Judge:
        heads = SimpleNamespace(instruction_id=lambda _: 0)
        world_model = SimpleNamespace(frame_shape=(32, 32, 3))

    def probability(_, frames, *__):
        return np.full(len(frames), torch.get_num_threads(), np.float32)

    monkeypatch.setattr(curate, "_judge_of", lambda _: Judge())
    monkeypatch.setattr(judging, "success_probability", probability)
    data, before = write_dataset(tmp_path / "data", [robot_episode(0)]), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(config([data], tmp_path / "out", success_by="somebody"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(open_dataset(tmp_path / "out")[0].labels["success_probability"]) == {1}
