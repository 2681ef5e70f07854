import numpy as np
import pytest

from policies.demonstrations import load_demonstrations, waypoints
from wfm_core.data.actions import to_physical
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode


def episode(index, steps, *, instruction="go", behaviour="expert", success=True, agent_pos=True):
    """Frame t is filled with t, action t moves by 0.1 * t in x (normalised); the gripper closes at step 2."""
    actions = np.zeros((steps, 7), np.float32)
    actions[:, 0] = 0.1 * np.arange(steps)
    actions[:, 6] = np.where(np.arange(steps) < 2, 1, -1)
    positions = np.zeros((steps + 1, 7), np.float32)
    positions[:, 0], positions[:, 5] = np.arange(steps + 1), 0.1 * index
    succeeded = np.zeros(steps + 1, bool)
    succeeded[-1] = success
    return Episode(
        frames=np.full((steps + 1, 8, 8, 3), 0, np.uint8) + np.arange(steps + 1, dtype=np.uint8)[:, None, None, None],
        actions=to_physical(actions),
        agent_pos=positions if agent_pos else None,
        instruction=instruction,
        episode_id=str(index),
        convention="commanded",
        command_lag=0,
        labels={"success": succeeded},
        meta={"behaviour": behaviour},
    )


@pytest.fixture
def demos(tmp_path):
    episodes = [episode(i, 4 + i, instruction=("go", "stop")[i % 2]) for i in range(8)]
    episodes.insert(2, episode(90, 5, behaviour="idle"))
    episodes.insert(5, episode(91, 5, success=False))
    build_clip_cache(episodes[:4], tmp_path / "first")
    build_clip_cache(episodes[4:], tmp_path / "second")
    return load_demonstrations([tmp_path / "first", tmp_path / "second"], ["expert"])


def test_chooses_successful_experts(demos):
    assert (demos.last - demos.first).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert demos.instructions == ["go", "stop"]
    assert demos.instruction_id[demos.first].tolist() == [0, 1] * 4
    assert len(demos.frame_indices()) == sum(range(4, 12))
    assert all(demos.frames(demos.first)[:, 0, 0, 0] == 0)
    assert demos.frames(demos.last)[:, 0, 0, 0].tolist() == list(range(4, 12))
    assert demos.frames(demos.last[::-1])[:, 0, 0, 0].tolist() == list(range(11, 3, -1))
    np.testing.assert_allclose(demos.agent_pos[demos.last, 0], range(4, 12))


def test_chunks_hold_after_the_end_of_their_episode(demos):
    first = demos.first[1]  # five actions
    chunks = demos.chunks(np.array([first, first + 3]), 4)
    np.testing.assert_allclose(chunks[0, :, 0], [0, 0.1, 0.2, 0.3], atol=1e-6)
    np.testing.assert_allclose(chunks[0, :, 6], [1, 1, -1, -1], atol=1e-6)
    np.testing.assert_allclose(chunks[1, :, 0], [0.3, 0.4, 0, 0], atol=1e-6)
    np.testing.assert_allclose(chunks[1, :, 6], [-1] * 4, atol=1e-6)


def test_waypoints_are_where_the_gripper_next_changes():
    actions = np.zeros((7, 7), np.float32)
    actions[:, 6] = [1, 1, -1, -1, 1, 1, 1]
    agent_pos = np.arange(7)[:, None] + np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
    at = waypoints(actions, agent_pos)
    np.testing.assert_allclose(at[:, 0], [2, 2, 2, 4, 4, 6, 6])
    np.testing.assert_allclose(at[0], [2, 2.1, 2.2, 2.5], atol=1e-6)


def test_the_cache_gets_waypoints_and_instructions(demos):
    first = demos.first[3]
    assert demos.waypoint[first : first + 4, 0].tolist() == [2, 2, 2, 7]
    assert demos.waypoint[first, 3] == pytest.approx(0.3)


def test_splits_are_nested_and_apart(demos):
    one, held_out = demos.split(1, 1, seed=3)
    two, same = demos.split(2, 1, seed=3)
    everything, _ = demos.split(0, 1, seed=3)
    assert set(one.first) < set(two.first) < set(everything.first)
    assert held_out.first.tolist() == same.first.tolist()
    assert not set(held_out.first) & set(everything.first)
    assert len(everything.first) + len(held_out.first) == 8
    assert sorted(two.instruction_id[two.first]) == [0, 0, 1, 1]
    assert set(demos.split(1, 1, seed=4)[0].first) != set(one.first) or set(demos.split(1, 1, seed=5)[0].first) != set(
        one.first
    )


def test_too_few_demonstrations_are_named(demos):
    with pytest.raises(ValueError, match="'go' needs 4 demonstrations and 1 held out, the cache has 4"):
        demos.split(4, 1, seed=0)


def test_a_data_set_without_success_is_named(tmp_path):
    unlabelled = episode(0, 4)
    unlabelled.labels.clear()
    build_clip_cache([unlabelled], tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare: demonstrations are chosen by the label success, which it lacks"):
        load_demonstrations([tmp_path / "bare"], ["expert"])


def test_refuses_what_cannot_be_cloned(tmp_path):
    build_clip_cache([episode(0, 4, behaviour="idle")], tmp_path / "idle")
    with pytest.raises(ValueError, match=r"\['expert'\], got behaviours \['idle'\]"):
        load_demonstrations([tmp_path / "idle"], ["expert"])
    build_clip_cache([episode(0, 4, agent_pos=False)], tmp_path / "blind")
    with pytest.raises(ValueError, match="agent_pos"):
        load_demonstrations([tmp_path / "blind"], ["expert"])
    with pytest.raises(ValueError, match="absent"):
        load_demonstrations([tmp_path / "absent"], ["expert"])
