import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from worldsim_fakes import MakeBroken, MakeFake, Silent, contest

from worldsim.campaign import num_rows
from worldsim.contest import episode_pairs, hold_contest
from worldsim.store import EpisodeStore


def hold(store_dir, chosen, **arguments):
    progress = Silent()
    with EpisodeStore(store_dir) as store:
        result = hold_contest(chosen, store, progress, **({"num_envs": 8, "num_workers": 2} | arguments))
    return *result, progress


def lines_in(store_dir):
    return sum(path.read_bytes().count(b"\n") for path in (store_dir / "episodes").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("num_pairs", "num_envs", "rows"), [(24, 16, 12), (24, 64, 24), (24, 8, 8), (5, 4, 3), (1, 9, 1)]
)
def test_rows_fill_equal_waves(num_pairs, num_envs, rows):
    assert num_rows(num_pairs, num_envs) == rows


def test_pairs_visit_all_states_and_fewer_begin_more():
    pairs = episode_pairs(24, 24, 100)
    assert sorted(state for state, _ in pairs) == list(range(24))
    assert [seed for _, seed in pairs] == list(range(100, 124))
    assert episode_pairs(7, 24, 100) == pairs[:7]
    assert len(set(episode_pairs(60, 24, 0))) == 60
    assert sorted(state for state, _ in episode_pairs(7, 7, 0)) == list(range(7))
    with pytest.raises(ValueError, match="at least 1"):
        episode_pairs(0, 24, 0)


def test_contest_without_twin_and_with_more_episodes_later(tmp_path):
    ranking, records, progress = hold(tmp_path, contest(twin=False))
    assert [policy["name"] for policy in ranking["policies"]] == ["good", "fair", "poor"]
    assert ranking["agreement"] is None
    assert "twin" not in ranking["policies"][0]
    # 3 policies x 2 tasks x 20 pairs, then 3 probes x 2 tasks x 4 pairs
    assert progress.stages == [("imagined", 120, 0), ("imagined", 24, 0)]
    assert len(records) == progress.advanced == lines_in(tmp_path) == 144
    *_, progress = hold(tmp_path, contest(twin=False, pairs=episode_pairs(24, 24, seed=5)))
    assert progress.stages[0] == ("imagined", 144, 120)
    assert progress.advanced == 24


def test_ranking_does_not_depend_on_rows_or_workers(tmp_path):
    results = [
        hold(tmp_path / str(k), contest(), num_envs=envs, num_workers=workers)[0]
        for k, (envs, workers) in enumerate([(3, 1), (50, 2)])
    ]
    assert json.dumps(results[0]) == json.dumps(results[1])
    ranking = results[0]
    assert [policy["twin"]["rank"] for policy in ranking["policies"]] == [1, 2, 3]
    assert ranking["agreement"]["policies"]["pearson"]["value"] > 0.8
    counts = ranking["episodes"]
    names = ("true_positive", "false_positive", "false_negative", "true_negative")
    assert sum(counts[name] for name in names) == 120
    # One in seven imagined outcomes is wrong.
    assert 0.7 < counts["accuracy"] < 0.95
    card = ranking["reward_card"]
    assert card["shuffled_policy"] == "good"
    assert card["false_success"]["probe:no-op"]["episodes"] <= 8


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (MakeBroken(), "policy 'good' on task 'push' in the twin world failed: RuntimeError: no screen"),
        (MakeFake("deadly"), "ended by signal 9.*episodes are safe"),
    ],
)
def test_failing_worker_is_told_and_costs_no_episode(tmp_path, make_env, message):
    start = contest(num_probe_pairs=0)
    assert start.twin
    with pytest.raises(RuntimeError, match=message):
        hold(tmp_path, replace(start, twin=replace(start.twin, make_env=make_env)), num_workers=1)
    assert len(EpisodeStore(tmp_path)) == 120  # the imagined ones


COMMAND = [sys.executable, "-c", "import sys; from worldsim_fakes import run_contest; run_contest(sys.argv[1])"]


def test_killed_contest_resumes_to_the_same_result_and_repeats_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "FAKE_STEP_SECONDS": "0.01"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    num_episodes = 2 * (3 * 2 * 20 + 3 * 2 * 4)
    for threshold in (60, 200):  # in imagination, then in the twin, whose workers must not outlive the command
        process = subprocess.Popen([*COMMAND, str(killed)], env=environment, stderr=subprocess.DEVNULL)
        while not (killed / "store" / "episodes").exists() or lines_in(killed / "store") < threshold:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        time.sleep(0.5)
        before = lines_in(killed / "store")
        assert threshold <= before < num_episodes
        time.sleep(0.5)
        assert lines_in(killed / "store") == before, "a worker outlived the command"
    environment["FAKE_STEP_SECONDS"] = "0"
    for out in (killed, whole):
        subprocess.run([*COMMAND, str(out)], env=environment, check=True)
        assert lines_in(out / "store") == num_episodes == len(EpisodeStore(out / "store"))
    assert (killed / "ranking.json").read_text() == (whole / "ranking.json").read_text()


def test_policy_that_does_not_load_is_named_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="no such weights"):
        hold(tmp_path, contest(policies={"good": "good", "broken": "broken"}, hashes={"good": "g", "broken": "b"}))
    assert lines_in(tmp_path) == 0
    assert Path(tmp_path).exists()
