"""One whole `worldsim-rank` with nothing faked: the shipped world model, the MuJoCo twin and two shipped policies."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet

from wfm_core.data.video import decode_video
from worldsim import campaign
from worldsim.commands.rank import RankConfig, run

WORLD_MODEL = "bridge-nano-ar"  # not a tiny one: judge and report want imagined frames of the twin's size
POLICIES = ["scripted", "scripted_noise_80"]
PROBES = ["probe:no-op", "probe:random", "probe:shuffled"]
TASK = "reach_target"
NUM_EPISODES, NUM_PROBE_EPISODES, NUM_VIDEOS = 2, 1, 1
WORLDS = ("imagined", "twin")


class Loads(HTMLParser):
    """Collects what a page makes a browser load, and the sources of its videos."""

    def __init__(self, page):
        super().__init__()
        self.addresses = re.findall(r"(?:url\(|@import)[\s'\"]*([^\s'\")]+)", page)
        self.videos = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        loading = {"src", "srcset", "poster", "data", "href", "xlink:href"} - ({"href"} if tag == "a" else set())
        self.addresses += [values[name] for name in loading & values.keys()]
        if tag == "video":
            self.videos.append(values["src"])


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def check_ranking(ranking):
    assert sorted(policy["name"] for policy in ranking["policies"]) == POLICIES
    assert ranking["tasks"] == [TASK]
    for policy in ranking["policies"]:
        for world in WORLDS:
            low, high = policy[world]["interval"]
            assert 0 <= low <= policy[world]["success"] <= high <= 1
            assert policy[world]["tasks"][TASK]["episodes"] == NUM_EPISODES
    rates = {world: {policy["name"]: policy[world]["success"] for policy in ranking["policies"]} for world in WORLDS}
    assert rates["twin"]["scripted"] == 1  # it solves the task from every initial state
    imagined = [policy["imagined"]["success"] for policy in ranking["policies"]]
    assert imagined == sorted(imagined, reverse=True)
    card = ranking["reward_card"]
    assert card["head_on_truth"]["accuracy"] in (0, 0.5, 1)  # one video of each policy
    assert 0 <= card["false_success"]["all"]["success"] <= 1


def check_episodes(table, ranking):
    rows = table.to_pylist()
    for world in WORLDS:
        here = [row for row in rows if row["world"] == world]
        assert len(here) == len(POLICIES) * NUM_EPISODES + len(PROBES) * NUM_PROBE_EPISODES
        assert {row["policy"] for row in here} == {*POLICIES, *PROBES}
        for policy in ranking["policies"]:
            own = [row["success"] for row in here if row["policy"] == policy["name"]]
            assert np.mean(own) == policy[world]["success"]
    assert {row["task"] for row in rows} == {TASK}
    assert len({row["key"] for row in rows}) == len(rows)
    assert all(1 <= row["length"] <= 40 for row in rows)


def check_report(page, tmp_path):
    loads = Loads(page)
    assert not [address for address in loads.addresses if not address.startswith(("data:", "#"))]
    assert len(loads.videos) == len(POLICIES) * NUM_VIDEOS
    kind, _, content = loads.videos[0].partition(",")
    assert kind == "data:video/mp4;base64"
    (tmp_path / "seen.mp4").write_bytes(base64.b64decode(content, validate=True))
    frames = decode_video(tmp_path / "seen.mp4")
    assert frames.shape[1:] == (132, 264, 3)  # two worlds with a gap between them and a bar below
    # Both worlds start from the same scene, and then the arm moves.
    assert np.abs(frames[0, :128, :128].astype(float) - frames[0, :128, 136:]).mean() < 8
    assert (frames[0] != frames[len(frames) // 2]).any()


def test_a_ranking_from_policies_to_report_and_again(tmp_path, monkeypatch, threads, capsys):
    out = tmp_path / "out"
    config = RankConfig(
        policies=POLICIES,
        tasks=TASK,
        world_model=WORLD_MODEL,
        num_episodes=NUM_EPISODES,
        num_probe_episodes=NUM_PROBE_EPISODES,
        num_videos=NUM_VIDEOS,
        workers=1,
        device="cpu",
        out=str(out),
    )
    run(config)
    ranking = json.loads((out / "ranking.json").read_text())
    check_ranking(ranking)
    episodes = pyarrow.parquet.read_table(out / "episodes.parquet")
    check_episodes(episodes, ranking)
    check_report((out / "report.html").read_text(), tmp_path)
    assert str(out / "report.html") in capsys.readouterr().out

    def evaluate_again(*_, **__):
        raise AssertionError("every episode is in the store already")

    store = files_of(out / "store")
    monkeypatch.setattr(campaign, "evaluate", evaluate_again)  # in this process; workers would append to the store
    run(config)
    assert files_of(out / "store") == store
    again = json.loads((out / "ranking.json").read_text())
    assert {**again, "provenance": None} == {**ranking, "provenance": None}
    assert pyarrow.parquet.read_table(out / "episodes.parquet").equals(episodes)
