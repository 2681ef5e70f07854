import json
import shutil

import numpy as np
import pytest
import torch

from wfm_core import rollouts
from wfm_core.checkpoint import load_tokenizer, load_world_model
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.encoding import encode_cache
from wfm_core.models.motion import Contact
from wfm_core.rollouts import imagine_episodes, keep_imagined, swapped_actions


def make_episode(index: int, length: int, instruction: str = "push") -> Episode:
    rng = np.random.default_rng(index)
    return Episode(
        frames=rng.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8),
        actions=rng.uniform(-0.05, 0.05, (length - 1, 7)).astype(np.float32),
        agent_pos=None,
        instruction=instruction,
        episode_id=str(index),
        convention="commanded",
        command_lag=0,
    )


@pytest.fixture
def cache(tmp_path) -> ClipCache:
    return build_clip_cache((make_episode(k, length) for k, length in enumerate((12, 30, 21))), tmp_path / "cache")


@pytest.fixture
def real(cache, tiny_checkpoint):
    model, tokenizer = load_world_model(tiny_checkpoint, dtype=torch.float32), load_tokenizer(tiny_checkpoint)
    return model, tokenizer.codec, encode_cache(tokenizer, cache)


def test_imagining_is_stepping_from_the_first_frame(cache, real):
    model, codec, tokens = real
    episodes = np.array([2, 0])
    rolled, uncertainties = imagine_episodes(model, codec, cache, tokens, episodes)
    assert [len(values) for values in uncertainties] == [20, 11] and rolled.shape == (33, 4, 3)
    for place, (episode, offset) in enumerate(zip(episodes, (0, 21), strict=True)):
        start, length = cache.starts[episode], cache.lengths[episode]
        np.testing.assert_array_equal(rolled[offset], tokens[start])
        first = codec.unpack(tokens[[[start]]])
        state = model.start(first, torch.zeros(1, 0, 7), [episode])
        for t in range(length - 1):
            action = torch.from_numpy(cache.columns["actions"][start + t])[None]
            state, latents, uncertainty = model.step(state, action)
            np.testing.assert_array_equal(rolled[offset + t + 1], codec.pack(latents)[0])
            assert uncertainties[place][t] == pytest.approx(uncertainty.item(), abs=1e-5)


def test_imagined_episodes_turn_out_as_they_are_told_to(cache, real, monkeypatch):
    model, codec, tokens = real
    contact = np.random.default_rng(0).integers(0, Contact.UNKNOWN, len(tokens)).astype(np.uint8)
    contact[cache.starts[1] + 5] = Contact.UNKNOWN
    seen, step = [], model.step
    monkeypatch.setattr(model, "step", lambda state, action: seen.append(step(state, action)) or seen[-1])
    told, _ = imagine_episodes(model, codec, cache, tokens, np.array([0, 1]), contact=contact)
    for row, episode in enumerate((0, 1)):
        start, length = cache.starts[episode], cache.lengths[episode]
        drawn = np.array([state["contact"][row] for state, _, _ in seen])[: length - 1]
        recorded = contact[start + 1 : start + length]
        np.testing.assert_array_equal(drawn[recorded < Contact.UNKNOWN], recorded[recorded < Contact.UNKNOWN])
    left, _ = imagine_episodes(model, codec, cache, tokens, np.array([0, 1]))
    assert (left != told).any()


def test_what_knows_nothing_of_contact_is_not_told(cache, tiny_transformer):
    model, tokenizer = load_world_model(tiny_transformer, dtype=torch.float32), load_tokenizer(tiny_transformer)
    tokens = encode_cache(tokenizer, cache)
    contact = np.full(len(tokens), Contact.HELD, dtype=np.uint8)
    told, _ = imagine_episodes(model, tokenizer.codec, cache, tokens, np.array([0, 2]), contact=contact)
    left, _ = imagine_episodes(model, tokenizer.codec, cache, tokens, np.array([0, 2]))
    np.testing.assert_array_equal(told, left)
    monkeypatched = cache.episodes[0]["instruction"]
    cache.episodes[0]["instruction"] = "another"
    other, _ = imagine_episodes(model, tokenizer.codec, cache, tokens, np.array([0, 2]))
    cache.episodes[0]["instruction"] = monkeypatched
    assert (other[:12] != left[:12]).any() and (other[12:] == left[12:]).all()


def test_imagining_with_other_actions(cache, real):
    model, codec, tokens = real
    episodes = np.array([0, 1])
    recorded = cache.columns["actions"]
    same, _ = imagine_episodes(model, codec, cache, tokens, episodes, recorded.copy())
    other, _ = imagine_episodes(model, codec, cache, tokens, episodes, 0 * recorded)
    np.testing.assert_array_equal(same, imagine_episodes(model, codec, cache, tokens, episodes)[0])
    assert (other != same).any()
    np.testing.assert_array_equal(other[[0, 12]], tokens[[0, 12]])


def test_what_was_imagined_is_kept_under_the_name_of_what_made_it(cache, real, tiny_checkpoint, tmp_path, monkeypatch):
    tokens = real[2]
    contact = np.full(len(tokens), Contact.FREE, dtype=np.uint8)
    kept = keep_imagined(tiny_checkpoint, cache, tokens, contact)
    assert kept.shape == tokens.shape and kept.dtype == np.uint8
    np.testing.assert_array_equal(kept[cache.starts], tokens[cache.starts])
    assert (kept != tokens).any()
    again = []
    imagine = rollouts.imagine_cache
    monkeypatch.setattr(rollouts, "imagine_cache", lambda *args, **kwargs: again.append(1) or imagine(*args, **kwargs))
    np.testing.assert_array_equal(keep_imagined(tiny_checkpoint, cache, tokens, contact), kept)
    assert again == []
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["dynamics"]["refine_steps"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    keep_imagined(folder, cache, tokens, contact)
    keep_imagined(tiny_checkpoint, cache, tokens[:, ::-1], contact)  # as another encoder would have it
    assert (keep_imagined(tiny_checkpoint, cache, tokens, contact + np.uint8(Contact.HELD)) != kept).any()
    assert again == [1, 1, 1] and len(list(cache.directory.glob("imagined.*"))) == 4


def test_swapped_actions_are_those_of_another_episode_of_the_instruction_if_there_is_one(tmp_path):
    given = (("push", 9), ("lift", 5), ("push", 4))
    cache = build_clip_cache((make_episode(k, n, text) for k, (text, n) in enumerate(given)), tmp_path / "cache")
    swapped, actions = swapped_actions(cache, np.random.default_rng(0)), cache.columns["actions"]
    np.testing.assert_array_equal(swapped[:9], actions[14 + np.arange(9) % 3])  # of the other push, over and over
    np.testing.assert_array_equal(swapped[14:], actions[:4])
    donor = next(start for start in (0, 14) if (swapped[9] == actions[start]).all())
    np.testing.assert_array_equal(swapped[9:12], actions[donor : donor + 3])
