import json

import numpy as np
import pytest

from tasks.task import REWARD_TERMS
from worldsim.evaluate import EpisodeRecord
from worldsim.leaderboard import IMAGINED, TWIN, as_text, confusion, outcomes, rank_policies
from worldsim.ranking import wilson_interval

PAIRS = [(k, k + 50) for k in range(10)]
TASKS = ["a", "b"]
TERMS = dict.fromkeys(REWARD_TERMS, 0.0)


def record(world, policy, task, pair, success):
    reason = "success" if success else "horizon"
    return EpisodeRecord(
        policy,
        "h",
        world,
        "w",
        task,
        "{}",
        *pair,
        success,
        float(success),
        20 - 10 * success,
        reason,
        0.0,
        TERMS,
        TERMS,
    )


def records(rates):
    """The first `rate` tenths of the episodes of each (world, policy) succeed."""
    return [
        record(world, policy, task, pair, k < rate)
        for (world, policy), rate in rates.items()
        for task in TASKS
        for k, pair in enumerate(PAIRS)
    ]


RATES = {(IMAGINED, "p"): 4, (IMAGINED, "q"): 7, (IMAGINED, "r"): 7, (TWIN, "p"): 3, (TWIN, "q"): 9, (TWIN, "r"): 8}
HASHES = {name: f"hash-{name}" for name in "pqr"}


def test_outcomes_are_arranged_by_policy_task_and_pair():
    shuffled = records(RATES)
    np.random.default_rng(0).shuffle(shuffled)
    table = outcomes(shuffled, TWIN, ["q", "p"], TASKS, PAIRS)
    assert table.shape == (2, 2, 10)
    assert table.sum(-1).tolist() == [[9, 9], [3, 3]]
    assert table[0, 0].tolist() == [True] * 9 + [False]


def test_missing_episode_is_named():
    incomplete = [r for r in records(RATES) if not (r.world == TWIN and r.policy == "r" and r.pair == PAIRS[3])]
    with pytest.raises(ValueError, match="policy 'r' on task 'a' from initial state 3, seed 53 in the twin world"):
        rank_policies(incomplete, HASHES, TASKS, PAIRS, twin=True)


def test_ranking_orders_by_imagination_and_holds_the_figures():
    ranking = rank_policies(records(RATES), HASHES, TASKS, PAIRS, twin=True)
    json.dumps(ranking, allow_nan=False)
    names = [policy["name"] for policy in ranking["policies"]]
    assert names == ["q", "r", "p"]  # q and r tie: the order of the request, whatever the twin says
    assert [policy[IMAGINED]["rank"] for policy in ranking["policies"]] == [1, 1, 3]
    assert [policy[TWIN]["rank"] for policy in ranking["policies"]] == [1, 2, 3]
    last = ranking["policies"][2]
    assert last["hash"] == "hash-p"
    assert last[IMAGINED]["success"] == 0.4
    assert last[IMAGINED]["interval"] == list(wilson_interval(8, 20))
    assert last[IMAGINED]["tasks"]["b"]["successes"] == 4
    assert last[IMAGINED]["end_reasons"] == {"horizon": 12, "success": 8}
    assert last[IMAGINED]["mean_length"] == pytest.approx(0.4 * 10 + 0.6 * 20)
    assert last[IMAGINED]["mean_return"] == pytest.approx(0.4)
    assert last[IMAGINED]["to_first"]["value"] == pytest.approx(-0.3)
    assert ranking["policies"][0][IMAGINED]["to_first"] is None
    assert last["gap"]["value"] == pytest.approx(0.1)
    assert ranking["policies"][0]["gap"]["value"] == pytest.approx(-0.2)
    # Of 60 pairs of episodes: q loses 4 successes and r 2 in imagination, p gains 2.
    counts = {name: ranking["episodes"][name] for name in ("false_positive", "false_negative")}
    assert counts == {"false_positive": 2, "false_negative": 6}
    assert "2 policies tie for first" in " ".join(ranking["agreement"]["notes"])


def test_without_twin_nothing_is_said_of_it():
    only = [r for r in records(RATES) if r.world == IMAGINED]
    ranking = rank_policies(only, HASHES, TASKS, PAIRS, twin=False)
    assert ranking["agreement"] is None
    assert "gap" not in ranking["policies"][0]
    assert "true" not in as_text(ranking)


def test_the_twin_does_not_change_the_imagined_order():
    flipped = {key: (10 - rate if key[0] == TWIN else rate) for key, rate in RATES.items()}
    for rates in (RATES, flipped):
        ranking = rank_policies(records(rates), HASHES, TASKS, PAIRS, twin=True)
        assert [policy["name"] for policy in ranking["policies"]] == ["q", "r", "p"]


def test_text_is_aligned_and_holds_the_figures():
    text = as_text(rank_policies(records(RATES), HASHES, TASKS, PAIRS, twin=True))
    lines = text.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[2].split() == ["1", "q", "70%", "[48", "to", "85]", "90%", "[70", "to", "97]", "-20"]
    assert "MMRV" in text
    assert "Note: 2 policies tie for first" in text


def test_repeated_initial_states_are_pointed_out():
    pairs = [(k % 2, k) for k in range(4)]
    some = [record(IMAGINED, policy, "a", pair, True) for policy in "pq" for pair in pairs]
    hashes = {"p": "1", "q": "2"}
    assert "used 2.0 times" in rank_policies(some, hashes, ["a"], pairs, twin=False)["notes"][0]
    assert rank_policies(some, hashes, ["a"], pairs[:2], twin=False)["notes"] == []


def test_confusion_counts():
    predicted, truth = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    matrix = confusion(predicted=predicted, truth=truth)
    assert [matrix[f"{a}_{b}"] for a in ("true", "false") for b in ("positive", "negative")] == [1, 1, 2, 1]
    assert matrix["accuracy"] == 0.4
