from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks import REWARD_TERMS, TASKS
from wfm_core.checkpoint import load_tokenizer, load_world_model
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.encoding import encode_cache
from wfm_core.tokenizers.latent_codec import LatentCodec
from worldsim import heads_data
from worldsim.heads import Heads, HeadsConfig, load_heads
from worldsim.heads_data import (
    HeadsBatches,
    action_pairs,
    calibrate,
    fair_threshold,
    instruction_ids,
    is_unfair,
    judge_episodes,
)
from worldsim.simulator import Calibration

INSTRUCTIONS = tuple(task.instruction for task in TASKS.values())
LENGTHS = (12, 30, 21)
CODEC = LatentCodec((1, 1), (16, 16))


def make_episode(index: int, length: int) -> Episode:
    """Labels count up, so that a value tells the frame; success in the last frames but for episode 0."""
    rng = np.random.default_rng(index)
    success = np.arange(length) >= (length - 4 if index else length)
    ramp = np.arange(length, dtype=np.float32) / 100 + index * 0.001
    return Episode(
        frames=rng.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8),
        actions=rng.uniform(-0.05, 0.05, (length - 1, 7)).astype(np.float32),
        agent_pos=np.tile(ramp[:, None], 7),
        instruction=INSTRUCTIONS[2 * index],
        episode_id=str(index),
        convention="commanded",
        command_lag=0,
        labels={f"reward.{term}": ramp if term != "success" else success.astype(np.float32) for term in REWARD_TERMS}
        | {"success": success, "failure": np.arange(length) == (5 if index == 0 else -1)},
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ClipCache:
    episodes = (make_episode(k, length) for k, length in enumerate(LENGTHS))
    return build_clip_cache(episodes, tmp_path_factory.mktemp("heads") / "cache")


def row_tokens(cache: ClipCache) -> np.ndarray:
    """(N, 1, 2) tokens that name the row of the cache."""
    rows = np.arange(len(cache.frames))
    return np.stack([rows // 16, rows % 16], axis=-1)[:, None].astype(np.uint8)


@pytest.fixture
def batches(cache) -> HeadsBatches:
    heads = Heads(HeadsConfig(INSTRUCTIONS, (1, 1, 2), width=8, num_heads=1, num_layers=1))
    return HeadsBatches(heads, CODEC, [cache], [row_tokens(cache)], batch_size=200, seed=4)


def rows_of(batch) -> np.ndarray:
    index = CODEC.pack(batch["latents"]).astype(np.int64)
    return (index[..., 0] * 16 + index[..., 1])[..., 0]


def test_a_data_set_without_labels_is_named(cache, batches):
    del (bare := ClipCache(cache.directory)).columns["reward.grasp"]
    heads = Heads(HeadsConfig(INSTRUCTIONS, (1, 1, 2), width=8, num_heads=1, num_layers=1))
    with pytest.raises(ValueError, match=r"cache: heads learn from labels .* lacks: \['reward.grasp'\]"):
        HeadsBatches(heads, CODEC, [bare], [row_tokens(bare)], batch_size=2, seed=4)


def test_pairs_stay_in_their_episode_and_carry_the_second_frames_labels(batches, cache):
    seen = set()
    for step in range(5):
        batch = batches(step)
        rows = rows_of(batch)
        assert (rows[:, 1] == rows[:, 0] + 1).all()
        assert not np.isin(rows[:, 1], cache.starts).any()
        episode = np.searchsorted(cache.starts, rows[:, 0], side="right") - 1
        assert batch["instruction_id"].tolist() == (2 * episode).tolist()
        np.testing.assert_array_equal(batch["agent_pos"], cache.columns["agent_pos"][rows])
        np.testing.assert_array_equal(batch["actions"], action_pairs(cache)[rows[:, 0]])
        for k, term in enumerate(REWARD_TERMS):
            np.testing.assert_array_equal(batch["reward_terms"][:, k], cache.columns[f"reward.{term}"][rows[:, 1]])
        np.testing.assert_array_equal(batch["failure"], cache.columns["failure"][rows[:, 1]])
        reference, start = rows_of(batch | {"latents": batch["reference"][:, None]})[:, 0], cache.starts[episode]
        assert ((start <= reference) & (reference <= rows[:, 0])).all()
        assert 0.4 < (reference == start).mean() < 0.75 and (reference == rows[:, 0]).any()
        seen |= set(rows[:, 0].tolist())
    assert seen == set(range(63)) - {11, 41, 62}  # every frame but the last of each episode


def test_pairs_carry_the_places_of_the_second_frame_if_asked_for(cache, batches, monkeypatch):
    assert "places" not in batches(0)
    monkeypatch.setattr(heads_data, "places", lambda cache: np.arange(len(cache.frames))[:, None, None] * np.ones(3))
    heads = Heads(HeadsConfig(INSTRUCTIONS, (1, 1, 2), width=8, num_heads=1, num_layers=1, places_weight=1.0))
    batch = HeadsBatches(heads, CODEC, [cache], [row_tokens(cache)], batch_size=200, seed=4)(0)
    np.testing.assert_array_equal(batch["places"][:, 0, 2], rows_of(batch)[:, 1])


def test_half_of_the_pairs_are_at_an_outcome(batches):
    outcome = [
        (batch["reward_terms"][:, REWARD_TERMS.index("success")] > 0.5) | batch["failure"]
        for batch in map(batches, range(20))
    ]
    assert torch.cat(outcome).float().mean() == pytest.approx(0.5, abs=0.03)
    failures = torch.cat([batches(step)["failure"] for step in range(20)]).float().mean()
    assert failures == pytest.approx(0.5 / 9, abs=0.02)  # one of nine outcome frames


@pytest.mark.parametrize(("transport", "near"), [(0.0, 1), (0.1, 0)])
def test_where_nothing_is_to_be_moved_near_misses_are_outcomes_too(transport, near, tmp_path):
    reach = np.zeros(21, np.float32)
    reach[7:10] = 0.5, 0.7, 0.9
    labels = {f"reward.{term}": np.zeros(21, np.float32) for term in REWARD_TERMS}
    labels |= {"reward.reach": reach, "reward.transport": np.full(21, transport, np.float32)}
    episode = replace(make_episode(2, 21), labels=labels | {"failure": np.arange(21) == 15})
    cache = build_clip_cache([episode], tmp_path / "cache")
    heads = Heads(HeadsConfig(INSTRUCTIONS, (1, 1, 2), width=8, num_heads=1, num_layers=1))
    batches = HeadsBatches(heads, CODEC, [cache], [row_tokens(cache)], batch_size=2000, seed=4)
    found = np.bincount(rows_of(batches(0))[:, 1], minlength=21) / 2000
    outcomes = [8, 9, 15] if near else [15]
    assert found[outcomes] == pytest.approx(0.5 / len(outcomes), abs=0.05)
    assert found[7] == pytest.approx(0.5 / (20 - len(outcomes)), abs=0.03)


def test_batches_are_functions_of_seed_and_step(batches):
    first = batches(3)
    batches(4)
    assert all(torch.equal(first[name], batches(3)[name]) for name in first)
    assert not np.array_equal(rows_of(first), rows_of(batches(4))) and first["seed"] != batches(4)["seed"]


def test_the_number_of_each_frames_instruction(cache, tiny_checkpoint):
    ids = instruction_ids(load_heads(tiny_checkpoint), cache)
    np.testing.assert_array_equal(ids, np.repeat([0, 2, 4], LENGTHS))


def test_the_threshold_separates_and_lies_in_the_middle():
    def peak(height: float, length: int = 3) -> np.ndarray:
        return np.array([0.01] * 4 + [height] * length + [0.01])

    yes, no = np.ones(3, dtype=bool), np.zeros(3, dtype=bool)
    truth = [yes, yes, no, no]
    assert fair_threshold(truth, [peak(0.9), peak(0.8), peak(0.4), peak(0.3)], 3) == pytest.approx(0.605, abs=0.011)
    # A peak that is too short is no verdict, however high.
    assert fair_threshold(truth, [peak(0.9), peak(0.5), peak(0.2), peak(1.0, 2)], 3) == pytest.approx(0.355, abs=0.011)
    # Above 0.7 or below 0.3 more verdicts would be right, but the rate would be wrong.
    mixed = [peak(0.95), peak(0.3), peak(0.7), peak(0.1)]
    assert fair_threshold(truth, mixed, 3) == pytest.approx(0.505, abs=0.011)
    # Nobody holds in truth: the rate is right from 0.3 to 0.4 only where all of the second kind are out.
    none = [np.zeros(5, dtype=bool)] * 2
    assert fair_threshold(none, [peak(0.3), peak(0.4)], 3) == pytest.approx(0.68, abs=0.011)


@pytest.fixture(scope="module")
def imagined(cache, tiny_checkpoint):
    model, tokenizer = load_world_model(tiny_checkpoint, dtype=torch.float32), load_tokenizer(tiny_checkpoint)
    return model, tokenizer.codec, encode_cache(tokenizer, cache)


def test_before_an_episode_the_arm_rests(cache):
    before, after = action_pairs(cache).swapaxes(0, 1)
    np.testing.assert_array_equal(after, cache.columns["actions"])
    later = np.setdiff1d(np.arange(len(after)), cache.starts)
    np.testing.assert_array_equal(before[later], after[later - 1])
    assert not before[cache.starts, :6].any()
    np.testing.assert_array_equal(before[cache.starts, 6], cache.columns["agent_pos"][cache.starts, 6])


def test_judging_an_episode_is_reading_its_pairs(cache, imagined, tiny_checkpoint):
    _, codec, tokens = imagined
    heads = load_heads(tiny_checkpoint)
    success, failure = judge_episodes(heads, codec, cache, tokens, batch_size=7)
    assert not success[cache.starts].any() and not failure[cache.starts].any()
    for row in set(range(63)) - set(cache.starts.tolist()):
        out = heads.read(
            codec.unpack(tokens[[[row - 1, row]]]),
            torch.from_numpy(cache.columns["agent_pos"][row - 1 : row]),
            torch.from_numpy(action_pairs(cache)[row - 1 : row]),
            torch.tensor([2 * (np.searchsorted(cache.starts, row, side="right") - 1)]),
            codec.unpack(tokens[[cache.starts[cache.starts <= row].max()]]),
        )
        assert success[row] == pytest.approx(out.success.item(), abs=1e-5)
        assert failure[row] == pytest.approx(out.failure.item(), abs=1e-5)


def test_calibration_fits_its_dataclass_and_does_not_depend_on_the_batch(cache, tiny_checkpoint, monkeypatch):
    limits = calibrate(tiny_checkpoint, [cache])
    assert 0 < Calibration(**limits).success_threshold < 1 and 0 < limits["failure_threshold"] < 1
    assert limits["uncertainty_limit"] == np.inf  # three episodes cannot promise one false alarm in fifty
    assert limits["success_thresholds"] == {}  # nor show that one threshold for all is unfair
    assert calibrate(tiny_checkpoint, [cache], batch_size=2) == limits
    asked, calls = [], []
    monkeypatch.setattr(heads_data, "is_unfair", lambda *given: asked.append(given) or len(asked) == 2)
    monkeypatch.setattr(heads_data, "fair_threshold", lambda truth, _, steps: calls.append(truth) or len(calls) / 10)
    limits = calibrate(tiny_checkpoint, [cache])
    assert limits["success_threshold"] == 0.1 and [given[0] for given in asked] == [0.1] * 3
    second = sorted(INSTRUCTIONS[::2])[1]
    assert limits["success_thresholds"] == {second: 0.2}
    episode = INSTRUCTIONS.index(second) // 2
    start, length = cache.starts[episode], cache.lengths[episode]
    assert len(calls[1]) == 2  # filmed and imagined
    for flags in calls[1]:
        np.testing.assert_array_equal(flags, cache.columns["success"][start : start + length])


def test_a_threshold_is_unfair_only_beyond_chance():
    yes, no, sure, unsure = np.ones(3, bool), np.zeros(3, bool), np.full(3, 0.9), np.full(3, 0.1)
    misses, inventions, right = ([yes], [unsure]), ([no], [sure]), ([yes, no], [sure, unsure])

    def unfair(*counts: int) -> bool:
        truth, probability = (
            sum((count * part[k] for count, part in zip(counts, (misses, inventions, right), strict=True)), [])
            for k in range(2)
        )
        return is_unfair(0.5, truth, probability, 3)

    assert not unfair(0, 0, 5) and not unfair(4, 0, 9) and not unfair(6, 2, 0) and not unfair(20, 30, 3)
    assert unfair(5, 0, 9) and unfair(0, 5, 0) and unfair(20, 36, 3)
