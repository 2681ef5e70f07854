import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tasks.task import REWARD_TERMS
from wfm_core.data.video import decode_video
from worldsim.clips import choose_clips, side_by_side
from worldsim.evaluate import EpisodeRecord, Trace
from worldsim.leaderboard import rank_policies
from worldsim.report import write_report
from worldsim.store import EpisodeStore

PAIRS = [(k, k) for k in range(6)]
TASKS = ["push_cube", "stack_cubes"]
POLICIES = {"good": 5, "<b>bad</b>": 1}
TERMS = dict.fromkeys(REWARD_TERMS, 0.0)


def trace(length, level):
    frames = np.full((length + 1, 32, 32, 3), level, np.uint8)
    return Trace(frames, np.zeros((length + 1, 7), np.float32), np.zeros((length, 7), np.float32))


def episode(world, policy, task, pair, success):
    reason = "success" if success else "horizon"
    head = (policy, f"hash {policy}", world, f"{world} hash", task, "{}")
    return EpisodeRecord(*head, *pair, success, 1.0, 4 if success else 9, reason, 0.0, TERMS, TERMS)


@pytest.fixture(scope="module", params=[True, False], ids=["twin", "no twin"])
def held(request, tmp_path_factory):
    """A ranking, its records and its store; in the twin the last success of every cell is a failure."""
    twin = request.param
    store = EpisodeStore(tmp_path_factory.mktemp("store"))
    for world in ("imagined", "twin") if twin else ("imagined",):
        for policy, successes in POLICIES.items():
            for task in TASKS:
                for k, pair in enumerate(PAIRS):
                    record = episode(world, policy, task, pair, k < successes - (world == "twin"))
                    store.append(record, trace(record.length, 60 if world == "twin" else 200))
    records = store.records()
    ranking = rank_policies(records, {name: f"hash {name}" for name in POLICIES}, TASKS, PAIRS, twin=twin)
    rate = {"successes": 0, "episodes": 4, "success": 0.0, "interval": [0.0, 0.49]}
    ranking["reward_card"] = {
        "false_success": {"probe:no-op": rate, "probe:random": rate, "probe:shuffled": rate, "all": rate},
        "shuffled_policy": "good",
        "head_on_truth": ranking["episodes"],
    }
    ranking["world_model"] = {"name": "nano", "hash": "abc"}
    ranking["twin"] = {"hash": "def"} if twin else None
    ranking["provenance"] = {
        "command": "worldsim-rank policies=all",
        "date": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "machine": "m",
        "gpu": None,
        "python": "3.12",
        "versions": {"torch": "2"},
    }
    return ranking, records, store


class Page(HTMLParser):
    """Collects the tags, and fails where they do not nest."""

    VOID = {"meta"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def test_report_is_one_whole_offline_page(held, tmp_path):
    ranking, records, store = held
    write_report(ranking, records, store, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://|url\(|@import", html)
    text = re.sub(r"\s+", " ", " ".join(page.text))
    assert "<b>bad</b>" in text  # shown, not obeyed
    assert "<b>bad" not in html
    assert "Imagination would deploy good" in text
    for word in ("worldsim-rank policies=all", "hash good", "shuffled in time"):
        assert word in text
    twin = ranking["agreement"] is not None
    assert ("Does imagination agree" in text) == twin
    assert ("was not checked against the twin" in text) == (not twin)
    assert len(html) < 2_000_000


def test_videos_show_both_worlds_by_kind(held, tmp_path):
    ranking, records, store = held
    clips = choose_clips(records, store)
    twin = ranking["agreement"] is not None
    expected = (
        ["Both succeed", "Both fail", "Imagination too kind"] if twin else ["Imagined successes", "Imagined failures"]
    )
    assert list(clips) == expected
    for title, chosen in clips.items():
        assert len(chosen) == 4
        assert {clip.imagined.task for clip in chosen} == set(TASKS)
        assert {clip.imagined.policy for clip in chosen} == (set(POLICIES) if title != "Both succeed" else {"good"})
        for clip in chosen:
            if clip.true:
                assert (clip.true.policy, clip.true.task, clip.true.pair) == (
                    clip.imagined.policy,
                    clip.imagined.task,
                    clip.imagined.pair,
                )
    clip = clips[expected[-1]][0]
    (tmp_path / "clip.mp4").write_bytes(clip.mp4)
    frames = decode_video(tmp_path / "clip.mp4")
    assert frames.shape[1:] == ((36, 72, 3) if twin else (36, 32, 3))
    assert abs(frames[0, 10, 10].mean() - 200) < 10
    if twin:
        assert abs(frames[0, 10, 60].mean() - 60) < 10


def test_records_without_video_are_passed_over(tmp_path):
    store = EpisodeStore(tmp_path)
    store.append(episode("imagined", "good", TASKS[0], (0, 0), True))
    assert choose_clips(store.records(), store) == {}


def test_side_by_side_waits_for_the_longer_and_colours_the_end():
    short, long = trace(3, 10), trace(8, 20)
    long.frames[:, 0, 0, 0] = np.arange(9)
    frames = side_by_side([(short, True), (long, False)])
    assert frames.shape == (9 + 5, 36, 72, 3)
    assert frames[:, 0, 40, 0].tolist() == [*range(9), 8, 8, 8, 8, 8]
    left, right = frames[:, 34, 0].astype(int), frames[:, 34, 40].astype(int)
    assert len(set(map(tuple, left[:3]))) == 1  # running
    assert (left[3:, 1] > left[3:, 0]).all()  # green from its end on
    assert (right[8:, 0] > right[8:, 1] + 50).all()  # red
    assert (right[:8] == left[0]).all()


def test_undefined_and_tied_figures_are_worded(tmp_path):
    store = EpisodeStore(tmp_path / "store")
    records = [
        episode(world, policy, task, pair, world == "imagined" or policy == "a")
        for world in ("imagined", "twin")
        for policy in ("a", "b")
        for task in TASKS
        for pair in PAIRS
    ]
    ranking = rank_policies(records, {"a": "x", "b": "y"}, TASKS, PAIRS, twin=True)
    ranking |= {"reward_card": {"false_success": None, "shuffled_policy": "a", "head_on_truth": None}}
    ranking |= {"world_model": {"name": "n", "hash": "h"}, "twin": {"hash": "t"}}
    ranking["provenance"] = dict.fromkeys(("command", "date", "seconds", "machine", "gpu", "python"), "?") | {
        "versions": {}
    }
    json.dumps(ranking, allow_nan=False)
    write_report(ranking, records, store, tmp_path / "report.html")
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "undefined" in text
    assert "puts 2 policies level at the top" in text
    assert "In the twin they reach 0% to 100%; the best of all is a with 100%." in re.sub(r"\s+", " ", text)
    assert "same success rate, so it ranks nothing" in text


def test_video_sources_decode(held, tmp_path):
    ranking, records, store = held
    write_report(ranking, records, store, tmp_path / "report.html")
    sources = re.findall(r'src="data:video/mp4;base64,([^"]+)"', (tmp_path / "report.html").read_text())
    assert len(sources) == sum(map(len, choose_clips(records, store).values()))
    (tmp_path / "first.mp4").write_bytes(base64.b64decode(sources[0]))
    assert len(decode_video(tmp_path / "first.mp4")) == 10
