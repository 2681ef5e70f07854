from dataclasses import replace

import numpy as np
import pytest

from tasks import TASKS
from tasks.camera import CAMERAS
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.models.motion import Contact
from worldsim.dynamics_data import STIR, closings, contacts, places, watched_cells

ARM = np.array([[0.25, 0.0, 0.1], [0.26, 0.02, 0.05], [0.3, -0.05, 0.03]])


def make_episode(task_name: str, positions: np.ndarray | None, agent_pos: bool = True) -> Episode:
    labels = {"grasped": np.full(3, -1)}
    return Episode(
        frames=np.zeros((3, 32, 32, 3), dtype=np.uint8),
        actions=np.zeros((2, 7), dtype=np.float32),
        agent_pos=np.pad(ARM, ((0, 0), (0, 4))).astype(np.float32) if agent_pos else None,
        instruction="do",
        episode_id=task_name,
        convention="commanded",
        command_lag=0,
        labels=labels if positions is None else labels | {"object_positions": positions},
        meta={"task_name": task_name},
    )


def around(u: float, v: float) -> np.ndarray:
    """Cells (8, 8) whose middles are within half a cell and 0.04 of a point, in both directions."""
    middles = (np.arange(8) + 0.5) / 8
    return (np.abs(middles - v) < 0.1025)[:, None] & (np.abs(middles - u) < 0.1025)


@pytest.mark.parametrize("name", ["stack_cubes", "put_eggplant_in_basket", "push_cube"])
def test_the_gripper_and_where_objects_are_and_were(name, tmp_path):
    task = TASKS[name]
    camera = CAMERAS[task.scene]
    uv = np.random.default_rng(0).uniform(0.1, 0.9, (3, 3, 2))
    positions = camera.unproject(uv, 0.03).astype(np.float32)
    cache = build_clip_cache([make_episode(name, positions.reshape(3, 9))], tmp_path / "cache")
    found = watched_cells(cache, 8)
    assert found.shape == (3, 64) and found.dtype == bool
    arm = camera.project(ARM)
    for t in range(3):
        expected = around(*arm[t])
        for k in range(len(task.objects)):
            expected |= around(*uv[t, k]) | around(*uv[0, k])
        np.testing.assert_array_equal(found[t].reshape(8, 8), expected)


def test_nothing_is_found_where_nothing_is_known(tmp_path):
    somewhere = np.tile(np.float32([0.25, 0.0, 0.02]), (3, 3))
    unknown = build_clip_cache([make_episode("juggle", somewhere)], tmp_path / "a")
    unlabelled = build_clip_cache([make_episode("push_cube", None)], tmp_path / "b")
    assert not watched_cells(unknown, 8).any() and not watched_cells(unlabelled, 8).any()
    armless = build_clip_cache([make_episode("push_cube", somewhere, agent_pos=False)], tmp_path / "c")
    assert 0 < watched_cells(armless, 8).sum() < 3 * 64


def test_places_are_those_of_the_gripper_and_the_objects_in_the_image(tmp_path):
    camera = CAMERAS[TASKS["reach_target"].scene]
    uv = np.array([[0.1, 0.9], [0.49, 0.51], [1.2, 0.5]])
    marker = camera.unproject(uv, 0.03).astype(np.float32)
    episodes = [make_episode("reach_target", marker), make_episode("juggle", marker)]
    found = places(build_clip_cache(episodes, tmp_path / "cache"))
    assert found.shape == (6, 3, 3)  # other tasks have two objects
    np.testing.assert_allclose(found[:3, 0, :2], camera.project(ARM), rtol=1e-5)
    np.testing.assert_allclose(found[:3, 1, :2], uv, rtol=1e-5)
    np.testing.assert_allclose(found[:3, :2, 2], np.stack([ARM[:, 2], marker[:, 2]], axis=1), rtol=1e-6)
    assert np.isnan(found[:3, 2:]).all() and np.isnan(found[3:]).all()
    armless = build_clip_cache([make_episode("reach_target", marker, agent_pos=False)], tmp_path / "armless")
    assert np.isnan(places(armless)[:, 0]).all() and np.isfinite(places(armless)[:, 1]).all()


def test_a_hand_that_is_told_to_close_is_found_once_for_each_time(tmp_path):
    episodes = [make_episode("push_cube", None) for _ in range(2)]
    commands = [[1.0, 0.0], [0.0, 0.0]]
    named = []
    for episode, name, gripper in zip(episodes, "ab", commands, strict=True):
        actions = episode.actions.copy()
        actions[:, -1] = gripper
        named.append(replace(episode, episode_id=name, actions=actions))
    found = closings(build_clip_cache(named, tmp_path / "cache"))
    assert found.tolist() == [False, True, False, False, False, False]  # the second hand was never open


def test_contact_is_an_object_held_or_else_one_that_moves(tmp_path):
    episodes = [make_episode("push_cube", np.zeros((3, 9), dtype=np.float32)) for _ in range(3)]
    pushed, lifted, stirred = (episode.labels["object_positions"] for episode in episodes)
    pushed[1:, 4] = 0.01  # at frame 1, and not since
    lifted[1:, 2] = 0.01
    episodes[1].labels["grasped"] = np.array([-1, -1, 0])
    stirred += 1.0  # elsewhere than the episode before
    stirred[2, 0] += 0.9 * STIR
    named = [replace(episode, episode_id=name) for episode, name in zip(episodes, "abc", strict=True)]
    found = contacts(build_clip_cache(named, tmp_path / "cache"))
    free, moved, held = Contact.FREE, Contact.MOVED, Contact.HELD
    assert found.tolist() == [free, moved, free, free, moved, held, free, free, free]
    unlabelled = build_clip_cache([make_episode("push_cube", None)], tmp_path / "unlabelled")
    assert (contacts(unlabelled) == Contact.UNKNOWN).all()


def test_an_arm_is_blocked_that_goes_less_than_half_of_what_the_last_two_commands_say(tmp_path):
    down, still, up = [[0, 0, z, 1, 1, 1, 0] for z in (-0.01, 0.0, 0.01)]
    heights = [
        (down, 0.100),
        (down, 0.098),  # an arm that follows late is not blocked
        (down, 0.088),
        (down, 0.083),
        (down, 0.080),  # 8 mm of 20
        (down, 0.080),
        (still, 0.080),
        (still, 0.080),  # nothing of 10
        (up, 0.080),  # it was not told to go anywhere
        (up, 0.090),
        (up, 0.095),
    ]
    made = make_episode("push_cube", None)
    agent_pos = np.zeros((len(heights), 7), dtype=np.float32)
    agent_pos[:, 2] = [z for _, z in heights]
    grasped = np.full(len(heights), -1)
    grasped[5:] = 0
    episode = replace(
        made,
        frames=np.zeros((len(heights), 32, 32, 3), dtype=np.uint8),
        actions=np.array([action for action, _ in heights[:-1]], dtype=np.float32),
        agent_pos=agent_pos,
        labels={"grasped": grasped, "object_positions": np.zeros((len(heights), 9), dtype=np.float32)},
    )
    armless = replace(episode, agent_pos=None, episode_id="armless")
    known = [build_clip_cache([episode, replace(episode, episode_id="next")], tmp_path / "cache")]
    known += [build_clip_cache([armless], tmp_path / "armless")]
    found = np.concatenate([contacts(cache) for cache in known])
    free, held, blocked, both = Contact.FREE, Contact.HELD, Contact.BLOCKED, Contact.HELD_BLOCKED
    expected = [free, free, free, free, blocked, both, both, both, held, held, held]
    assert found.tolist() == 2 * expected + 5 * [free] + 6 * [held]
