"""The probe on a world whose answers are known: one that moves as it is told, and one that moves as it likes."""

import cv2
import numpy as np
import pytest
import torch

from wfm_core.data.actions import BRIDGE_ACTIONS, ActionSpace
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.fidelity import LEAST_DRAWS, action_fidelity, motion_explained, others_actions
from wfm_core.models.scripted import ScriptedConfig, ScriptedWorldModel
from wfm_core.rollouts import imagined_frames
from wfm_core.tokenizers.latent_codec import LatentCodec

CODEC, SIZE, PIXELS_PER_METRE = LatentCodec((1, 1), ()), 64, 80
TABLE = cv2.resize(np.random.default_rng(0).integers(60, 200, (12, 12, 3)).astype(np.uint8), (SIZE, SIZE))


class Block(ScriptedWorldModel):
    """The point, drawn as a block on a table."""

    def decode(self, latents, reference=None):
        frames = np.repeat(TABLE[None], len(latents), axis=0)
        for frame, (x, y, _) in zip(frames, latents.view(-1, 3).tolist(), strict=True):
            column, row = (round(SIZE / 2 + PIXELS_PER_METRE * place) for place in (x, y))
            frame[max(row - 7, 0) : row + 7, max(column - 7, 0) : column + 7] = (220, 30, 30)
        return torch.from_numpy(frames)


class Deaf(Block):
    """Drifts along x, whatever it is told."""

    def step(self, state, action):
        drift = torch.zeros_like(action)
        drift[:, 0] = 0.01
        return super().step(state, drift)


MODEL = Block(ScriptedConfig(frame_size=SIZE))


def make_cache(folder, seeds: range, steps: int = 20) -> tuple[ClipCache, np.ndarray]:
    """Episodes of a block that goes where it is told, and its places as kept."""
    episodes, points = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        actions = np.zeros((steps, 7), np.float32)
        actions[:, :3] = rng.uniform(-0.03, 0.03, (steps, 3))
        latents = torch.from_numpy(np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:, :3], axis=0)])).float()
        latents = latents.view(-1, 1, 1, 3)
        episodes.append(Episode(MODEL.decode(latents).numpy(), actions, None, "go", str(seed), "commanded", 0))
        points.append(CODEC.pack(latents))
    return build_clip_cache(episodes, folder), np.concatenate(points)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("block")
    return make_cache(folder / "training", range(6)), make_cache(folder / "rest", range(20, 24))


def probe(model, data):
    (training, _), (cache, kept) = data
    shown = imagined_frames(model, CODEC, cache, kept)
    return action_fidelity(model, CODEC, cache, kept, shown, BRIDGE_ACTIONS, [training])


def test_a_world_that_obeys_is_found_out(data):
    found = probe(MODEL, data)
    assert found.follows and found.true_db > 30 > found.shuffled_db
    assert found.shuffled_cost_db == pytest.approx(found.true_db - found.shuffled_db)
    low, high = found.shuffled_cost_interval_db
    assert 0 < low < found.shuffled_cost_db < high
    assert found.still_db == pytest.approx(found.copy_db, abs=0.1)  # nothing moves
    assert found.still_cost_db == pytest.approx(found.true_db - found.still_db)
    assert min(found.motion_real, found.motion_true, found.motion_shuffled) > 0.6
    assert "follows its actions" in str(found)


def test_a_world_that_does_as_it_likes_is_found_out(data):
    found = probe(Deaf(MODEL.config), data)
    assert not found.follows and found.shuffled_cost_db == 0
    assert found.shuffled_cost_interval_db == (0, 0) and found.still_cost_db == 0
    assert found.motion_real > 0.6 and found.motion_true < 0.2 and found.motion_shuffled < 0.2
    assert "IGNORES ITS ACTIONS" in str(found)


def test_others_actions_are_another_episodes_from_its_start_over_and_over(data, tmp_path):
    cache, _ = data[1]
    short, _ = make_cache(tmp_path / "short", range(30, 31), steps=5)
    rng = np.random.default_rng(0)
    own = cache.columns["actions"].reshape(4, 21, 7)
    seen = set()
    for _ in range(LEAST_DRAWS):
        for k, given in enumerate(others_actions(cache, [cache, short], rng).reshape(4, 21, 7)):
            donor = next((j for j in range(4) if np.array_equal(given[:20], own[j][:20])), "short")
            assert donor != k
            if donor == "short":
                np.testing.assert_array_equal(given[:20], np.tile(short.columns["actions"][:5], (4, 1)))
            seen.add(donor)
    assert seen == {0, 1, 2, 3, "short"}
    with pytest.raises(ValueError, match="need another episode"):
        others_actions(short, [short], rng)


def test_targets_explain_motion_by_their_differences_and_short_episodes_nothing(data, tmp_path):
    cache, _ = data[1]
    frames, actions = np.asarray(cache.frames), cache.columns["actions"]
    space = ActionSpace((-1.0,) * 3, (1.0,) * 3, ())
    targets = np.concatenate([np.cumsum(actions[a : a + 21, :3], axis=0) for a in cache.starts])
    by_steps = motion_explained(cache, frames, actions, BRIDGE_ACTIONS)
    assert motion_explained(cache, frames, targets, space) == pytest.approx(by_steps, abs=0.05)
    assert motion_explained(cache, frames, np.roll(targets, 7, axis=0), space) < by_steps - 0.3
    short, _ = make_cache(tmp_path / "short", range(2), steps=5)
    assert np.isnan(motion_explained(short, np.asarray(short.frames), short.columns["actions"], BRIDGE_ACTIONS))
