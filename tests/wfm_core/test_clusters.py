"""Clusters, near copies and balance, on points whose groups are known."""

import numpy as np
import pytest

from wfm_core.curation import clusters as module
from wfm_core.curation.clusters import cluster, near_copies, standardised, surplus


def groups(sizes=(20, 30, 25), seed=0):
    rng = np.random.default_rng(seed)
    centres = 10 * np.eye(len(sizes), 8)
    return np.concatenate(
        [centre + 0.3 * rng.standard_normal((n, 8)) for centre, n in zip(centres, sizes, strict=True)]
    )


def test_clusters_are_the_groups_and_the_same_each_time():
    points = standardised(groups())
    labels = cluster(points, 3)
    parts = [set(labels[:20]), set(labels[20:50]), set(labels[50:])]
    assert [len(part) for part in parts] == [1, 1, 1] and len(set.union(*parts)) == 3
    np.testing.assert_array_equal(labels, cluster(points, 3))
    assert cluster(points).max() < 8  # the root of 75
    assert cluster(points[:1]).tolist() == [0] and cluster(points[:0]).tolist() == []


def test_centres_of_many_are_found_by_a_sample(monkeypatch):
    points = standardised(groups((200, 300, 250)))
    whole = cluster(points, 3)
    monkeypatch.setattr(module, "SAMPLE", 60)
    labels = cluster(points, 3)
    np.testing.assert_array_equal(labels, cluster(points, 3))
    pairs = set(zip(whole.tolist(), labels.tolist(), strict=True))  # the same groups, by whatever names
    assert len(pairs) == len(set(labels.tolist())) == 3


def test_vectors_are_standardised():
    points = groups()
    vectors = standardised(points * 7 + 3)
    np.testing.assert_allclose(vectors, standardised(points), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert standardised(np.ones((3, 2))).tolist() == [[0, 0]] * 3  # what does not vary says nothing


@pytest.mark.parametrize("block", [1, 3, 2048])
def test_of_near_copies_the_largest_is_kept(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    turn = np.deg2rad([0, 1, 40, 41, 42, 90, 1])
    vectors = np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)
    same = np.zeros(7, int)
    found = near_copies(vectors, same, [1, 1, 1, 5, 1, 1, 9], np.cos(np.deg2rad(1.5)))
    assert {copy: kept for copy, (kept, _) in found.items()} == {0: 6, 1: 6, 2: 3, 4: 3}
    assert found[4][1] == pytest.approx(np.cos(np.deg2rad(1))) and found[1][1] == pytest.approx(1)
    apart = near_copies(vectors, np.array([0, 1, 2, 3, 4, 5, 0]), [1] * 7, np.cos(np.deg2rad(1.5)))
    assert {copy: kept for copy, (kept, _) in apart.items()} == {6: 0}  # of equals the first
    assert near_copies(vectors, same, [1] * 7, 1.1) == {}


def test_surplus_is_taken_evenly():
    labels = ["a", "b"] * 3 + ["a"] * 3
    assert surplus(labels, 9) == {}
    gone = surplus(labels, 3)
    assert gone == {2: 6, 6: 6, 7: 6} or (len(gone) == 3 and {labels[k] for k in gone} == {"a"} and 0 not in gone)
    assert 8 not in gone and set(gone.values()) == {6}
