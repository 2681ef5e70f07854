"""The clip cache and the sampler: clips are the episode's own frames, damage is noticed, batches are reproducible."""

import json
import os

import numpy as np
import pytest

from wfm_core.data import clip_cache
from wfm_core.data.clip_cache import ClipCache, Joined, build_clip_cache
from wfm_core.data.episode import UNKNOWN_ACTIONS, Episode
from wfm_core.data.files import DataError
from wfm_core.data.sampler import ClipSampler


def make_episode(index: int, length: int, **changes) -> Episode:
    rng = np.random.default_rng(index)
    fields = {
        "frames": rng.integers(0, 256, (length, 8, 6, 3), dtype=np.uint8),
        "actions": rng.normal(size=(length - 1, 7)).astype(np.float32),
        "agent_pos": rng.normal(size=(length, 7)).astype(np.float32),
        "instruction": f"task {index}",
        "episode_id": str(index),
        "convention": "commanded",
        "command_lag": 0,
        "labels": {"success": rng.random(length) > 0.5, "positions": rng.normal(size=(length, 2))},
        "meta": {"seed": index},
    }
    return Episode(**fields | changes)


@pytest.fixture
def episodes():
    return [make_episode(k, frames) for k, frames in enumerate((9, 5, 12))]


@pytest.fixture
def cache(episodes, tmp_path):
    return build_clip_cache(iter(episodes), tmp_path / "cache", fingerprint="f")


def test_clips_are_the_episodes_own(cache, episodes):
    assert len(cache) == 3 and cache.lengths.tolist() == [9, 5, 12] and cache.fingerprint == "f"
    for k, episode in enumerate(episodes):
        whole = cache.clip(k, 0, len(episode.frames))
        np.testing.assert_array_equal(whole["frames"], episode.frames)
        np.testing.assert_array_equal(whole["actions"][:-1], episode.actions)
        np.testing.assert_array_equal(whole["actions"][-1], [0, 0, 0, 0, 0, 0, episode.actions[-1, 6]])
        np.testing.assert_array_equal(whole["agent_pos"], episode.agent_pos)
        for name, label in episode.labels.items():
            np.testing.assert_array_equal(whole[name], label)
        assert cache.episodes[k]["instruction"] == episode.instruction and cache.episodes[k]["meta"] == episode.meta
    np.testing.assert_array_equal(cache.clip(2, 4, 3)["frames"], episodes[2].frames[4:7])
    assert np.shares_memory(cache.clip(2, 4, 3)["frames"], cache.frames)


def test_a_subset_is_a_cache_of_some_episodes(cache, episodes):
    part = cache.subset([2, 0])
    assert len(part) == 2 and part.starts.tolist() == [0, 12] and len(cache) == 3
    for k, own in enumerate((2, 0)):
        for name, rows in cache.clip(own, 0, int(cache.lengths[own])).items():
            np.testing.assert_array_equal(part.clip(k, 0, int(cache.lengths[own]))[name], rows)
    assert [each["episode_id"] for each in part.episodes] == ["2", "0"] and not part.directory.exists()


def test_joined_arrays_are_read_where_they_are():
    parts = [np.arange(5), np.arange(5, 7), np.arange(7, 20)]
    rows = np.array([[3, 4, 1], [5, 6, 5], [8, 19, 7]])
    joined = Joined(parts)
    np.testing.assert_array_equal(joined[rows], rows)
    assert len(joined) == 20 and joined.part_of(rows).tolist() == [0, 1, 2]


def test_a_batch_equals_its_clips(cache):
    batch = cache.batch(np.array([14, 2, 9]), 5)
    for row, (episode, start) in enumerate([(2, 0), (0, 2), (1, 0)]):
        clip = cache.clip(episode, start, 5)
        assert batch["episode"][row] == episode
        for name, value in clip.items():
            np.testing.assert_array_equal(batch[name][row], value)
    assert set(cache.batch(np.array([0]), 2, columns=["actions"])) == {"frames", "episode", "actions"}


def test_clips_never_leave_their_episode(cache):
    with pytest.raises(IndexError, match="episode 1 has 5 frames, got a clip 2 to 6"):
        cache.clip(1, 2, 4)
    with pytest.raises(IndexError):
        cache.clip(1, -1, 2)
    with pytest.raises(IndexError):
        cache.batch(np.array([7]), 3)  # rows 7, 8 end episode 0
    with pytest.raises(IndexError):
        cache.batch(np.array([24]), 3)


def test_unknown_proprioception_is_nan(tmp_path):
    cache = build_clip_cache([make_episode(0, 4, agent_pos=None)], tmp_path / "cache")
    assert np.isnan(cache.columns["agent_pos"]).all()


def test_unknown_actions_are_nan_and_teach_nothing(tmp_path, cache):
    cache.require_actions()
    nothing = np.full((3, 7), np.nan, np.float32)
    silent = make_episode(0, 4, actions=nothing, convention=UNKNOWN_ACTIONS)
    silent_cache = build_clip_cache([silent], tmp_path / "silent")
    assert np.isnan(silent_cache.columns["actions"][:-1]).all()
    with pytest.raises(ValueError, match=r"silent: must have actions, got frames only"):
        silent_cache.require_actions()
    with pytest.raises(ValueError, match="actions must be finite"):
        make_episode(0, 4, actions=nothing)
    with pytest.raises(ValueError, match="must be NaN where they are unknown"):
        make_episode(0, 4, convention=UNKNOWN_ACTIONS)


def test_the_frames_file_is_an_ordinary_npy(cache, episodes):
    frames = np.load(cache.directory / "frames.npy")
    np.testing.assert_array_equal(frames, np.concatenate([episode.frames for episode in episodes]))


def test_mixed_episodes_are_refused(tmp_path, episodes):
    relabelled = make_episode(1, 5, convention="relabelled")
    with pytest.raises(ValueError, match=r"\('commanded', 0\), got \('relabelled', 0\) in 1"):
        build_clip_cache([episodes[0], relabelled], tmp_path / "cache")
    with pytest.raises(ValueError, match="command lag"):
        build_clip_cache([episodes[0], make_episode(1, 5, command_lag=1)], tmp_path / "cache")
    with pytest.raises(ValueError, match="labels must be"):
        build_clip_cache([episodes[0], make_episode(1, 5, labels={})], tmp_path / "cache")
    with pytest.raises(ValueError, match="frames must be"):
        small = np.zeros((5, 4, 4, 3), np.uint8)
        build_clip_cache([episodes[0], make_episode(1, 5, frames=small)], tmp_path / "cache")
    with pytest.raises(ValueError, match="at least one episode"):
        build_clip_cache([], tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
    mixed = build_clip_cache([episodes[0], relabelled], tmp_path / "cache", mixed_conventions=True)
    assert [entry["convention"] for entry in mixed.episodes] == ["commanded", "relabelled"]
    with pytest.raises(ValueError, match="must not exist yet"):
        build_clip_cache(episodes, tmp_path / "cache")


def test_a_full_disk_leaves_nothing(tmp_path, episodes, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clip_cache.os, "fsync", full)
    with pytest.raises(OSError, match=r"clip cache .*cache \(No space left on device\); nothing is kept"):
        build_clip_cache(episodes, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_build_the_same_the_quicker_one_serves_both(tmp_path, episodes):
    def interrupted(fingerprint: str):
        yield episodes[0]
        if not (tmp_path / "cache").exists():  # while this one is building, another process finishes
            build_clip_cache(episodes, tmp_path / "quick", fingerprint=fingerprint)
            (tmp_path / "quick").rename(tmp_path / "cache")

    cache = build_clip_cache(interrupted("same"), tmp_path / "cache", fingerprint="same")
    assert len(cache) == len(episodes) and cache.fingerprint == "same"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    (tmp_path / "cache").rename(tmp_path / "before")
    with pytest.raises(OSError, match="could not write the clip cache"):
        build_clip_cache(interrupted("another"), tmp_path / "cache", fingerprint="mine")


def test_damage_is_noticed_on_opening(cache):
    os.truncate(cache.directory / "frames.npy", 500)
    with pytest.raises(DataError, match=r"frames\.npy: must have 3872 bytes, found 500"):
        ClipCache(cache.directory)
    (cache.directory / "frames.npy").unlink()
    with pytest.raises(DataError, match=r"frames\.npy.*found nothing"):
        ClipCache(cache.directory)
    index = json.loads((cache.directory / "index.json").read_text())
    index["body"]["lengths"][0] = 8
    (cache.directory / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json: damaged \(checksum differs\)"):
        ClipCache(cache.directory)
    with pytest.raises(DataError, match=r"index\.json: not a clip cache"):
        ClipCache(cache.directory / "elsewhere")


def test_the_sampler_draws_every_window_that_fits_and_no_other():
    sampler = ClipSampler([9, 5, 12], clip_length=6, batch_size=64, seed=3)
    drawn = np.concatenate([sampler.batch(k) for k in range(20)])
    assert set(drawn.tolist()) == {0, 1, 2, 3, *range(14, 21)}  # episode 1 is too short
    only = ClipSampler([9, 5, 12], clip_length=6, batch_size=64, seed=3, episodes=[2])
    assert set(only.rows.tolist()) == set(range(14, 21))


def test_batches_depend_on_seed_and_step_alone():
    first = ClipSampler([30, 30], clip_length=4, batch_size=8, seed=1)
    resumed = ClipSampler([30, 30], clip_length=4, batch_size=8, seed=1)
    np.testing.assert_array_equal([first.batch(k) for k in range(7)][6], resumed.batch(6))
    assert (first.batch(0) != first.batch(1)).any()
    assert (first.batch(0) != ClipSampler([30, 30], clip_length=4, batch_size=8, seed=2).batch(0)).any()


def test_sampler_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="at least 6 frames, got at most 5"):
        ClipSampler([5, 3], clip_length=6, batch_size=1, seed=0)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_share_of_the_clips_shows_what_is_sought_in_their_midst(share):
    sought = np.zeros(60, dtype=bool)
    sought[[11, 30, 59]] = True  # the last two are the ends of their episodes
    sampler = ClipSampler(
        [30, 30], clip_length=5, batch_size=2000, seed=1, sought=[sought[:30], sought[30:]], sought_share=share
    )
    shows = np.isin(sampler.batch(0), [8, 9, 10])  # three windows of 52
    assert shows.mean() == pytest.approx(share + (1 - share) * 3 / 52, abs=0.04)
    none = ClipSampler([30, 30], clip_length=5, batch_size=9, seed=1, sought=[sought & False], sought_share=0.6)
    assert len(none.batch(0)) == 9
