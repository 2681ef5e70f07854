import pytest

from worldsim.evaluate import EpisodeRecord
from worldsim.ranking import wilson_interval
from worldsim.reward_card import false_success, head_on_truth


def record(world, policy, seed, success):
    return EpisodeRecord(policy, "h", world, "w", "t", "{}", 0, seed, success)


def test_false_success_counts_only_true_failures():
    records = [record("imagined", "probe:a", k, k < 3) for k in range(10)]
    records += [
        record("twin", "probe:a", k, k in (0, 9)) for k in range(10)
    ]  # 0 really succeeds, so imagination is right
    records += [record("imagined", "probe:b", k, False) for k in range(5)]
    records += [record("twin", "probe:b", k, False) for k in range(5)]
    card = false_success(records, ["probe:a", "probe:b"])
    assert (card["probe:a"]["successes"], card["probe:a"]["episodes"]) == (2, 8)
    assert card["probe:b"]["success"] == 0
    assert card["all"]["success"] == pytest.approx(2 / 13)
    assert card["all"]["interval"] == list(wilson_interval(2, 13))


def test_without_twin_no_probe_is_taken_to_succeed():
    card = false_success([record("imagined", "probe:a", k, k == 0) for k in range(4)], ["probe:a"])
    assert card["probe:a"]["success"] == 0.25


def test_head_on_truth_is_a_confusion_matrix():
    matrix = head_on_truth([(True, True), (True, False), (False, False), (False, False)])
    assert matrix is not None
    assert (matrix["true_positive"], matrix["false_positive"], matrix["true_negative"]) == (1, 1, 2)
    assert matrix["accuracy"] == 0.75
    assert head_on_truth([]) is None
