"""The probe on a world whose answers are known: one that moves as it is told, and one that moves as it likes."""

import numpy as np
import pytest
import torch

from wfm_core.data.actions import BRIDGE_ACTIONS
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.fidelity import LEAST_DRAWS, InverseDynamics, action_fidelity, others_actions
from wfm_core.models.scripted import ScriptedConfig, ScriptedWorldModel
from wfm_core.tokenizers.latent_codec import LatentCodec
from wfm_core.world_model import Reference

CODEC = LatentCodec((1, 1), ())
MODEL = ScriptedWorldModel(ScriptedConfig(frame_size=8, metres_per_level=0.002))


class Deaf(ScriptedWorldModel):
    """Drifts along x, whatever it is told."""

    def step(self, state, action):
        drift = torch.zeros_like(action)
        drift[:, 0] = 0.01
        return super().step(state, drift)


def make_cache(folder, seeds: range, steps: int = 12) -> tuple[ClipCache, np.ndarray]:
    """Episodes of a point that goes where it is told, and its latents as kept."""
    episodes, points = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        actions = np.zeros((steps, 7), np.float32)
        actions[:, :3] = rng.uniform(-0.03, 0.03, (steps, 3))
        point = np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:, :3], axis=0)])
        latents = torch.from_numpy(point).float().view(-1, 1, 1, 3)
        nothing = Reference(torch.zeros(len(latents), 8, 8, 3), latents)
        frames = MODEL.decode(latents, nothing).numpy()
        episodes.append(Episode(frames, actions, None, "go", str(seed), "commanded", 0))
        points.append(CODEC.pack(latents))
    return build_clip_cache(episodes, folder), np.concatenate(points)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("point")
    return make_cache(folder / "training", range(20)), make_cache(folder / "rest", range(20, 24))


def probe(model, data):
    training, (cache, kept) = data
    return action_fidelity(model, CODEC, cache, kept, BRIDGE_ACTIONS, [training])


def test_a_world_that_obeys_is_found_out(data):
    found = probe(MODEL, data)
    assert found.follows and found.true_db > 50 > found.shuffled_db > found.copy_db - 10
    assert found.shuffled_cost_db == pytest.approx(found.true_db - found.shuffled_db)
    low, high = found.shuffled_cost_interval_db
    assert 0 < low < found.shuffled_cost_db < high
    assert found.still_db == pytest.approx(found.copy_db, abs=0.1)  # nothing moves
    assert found.still_cost_db == pytest.approx(found.true_db - found.still_db)
    assert min(found.inverse_real, found.inverse_true, found.inverse_shuffled) > 0.95
    assert "follows its actions" in str(found)


def test_a_world_that_does_as_it_likes_is_found_out(data):
    found = probe(Deaf(MODEL.config), data)
    assert not found.follows and found.shuffled_cost_db == found.still_cost_db == 0
    assert found.shuffled_cost_interval_db == (0, 0)
    assert found.inverse_real > 0.95 and found.inverse_shuffled < 0.2
    assert "IGNORES ITS ACTIONS" in str(found)


def test_others_actions_are_another_episodes_from_its_start_over_and_over(data, tmp_path):
    (training, _), (cache, _) = data
    short, _ = make_cache(tmp_path / "short", range(30, 31), steps=5)
    rng = np.random.default_rng(0)
    own = cache.columns["actions"].reshape(4, 13, 7)
    seen = set()
    for _ in range(LEAST_DRAWS):
        for k, given in enumerate(others_actions(cache, [cache, short], rng).reshape(4, 13, 7)):
            donor = next((j for j in range(4) if np.array_equal(given[:12], own[j][:12])), "short")
            assert donor != k
            if donor == "short":
                np.testing.assert_array_equal(given[:10], np.tile(short.columns["actions"][:5], (2, 1)))
            seen.add(donor)
    assert seen == {0, 1, 2, 3, "short"}
    with pytest.raises(ValueError, match="need another episode"):
        others_actions(short, [short], rng)


def test_inverse_dynamics_know_nothing_of_what_frames_do_not_show(data):
    training, (cache, kept) = data
    inverse = InverseDynamics(CODEC, [training], np.random.default_rng(0))
    assert inverse.explained(cache, kept, cache.columns["actions"]) > 0.95
    assert inverse.explained(cache, kept, np.roll(cache.columns["actions"], 3, axis=0)) < 0.2
    nothing = make_cache(cache.directory.parent / "nothing", range(1), steps=0)
    with pytest.raises(ValueError, match="8 pairs of frames, got 0"):
        InverseDynamics(CODEC, [nothing], np.random.default_rng(0))
