"""Inverse dynamics: what a moving square was told is seen in the frames that follow."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from policies import load_policy
from policies.inverse_dynamics import InverseDynamics, InverseDynamicsConfig, load_inverse_dynamics
from policies.inverse_train import InverseTrainConfig, train_inverse_dynamics
from wfm_core.data.actions import to_physical
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import encode_video
from worldsim.commands.convert import ConvertConfig
from worldsim.commands.convert import run as convert

SIZE, STEPS = 32, 8


def episode(index: int, rng: np.random.Generator) -> Episode:
    """A square goes left or right a step after it was told to; a told gripper reddens the picture where it closes."""
    left_or_right = rng.choice([-1.0, 1.0], STEPS)
    closed = rng.random(STEPS) < 0.5
    column, frames = SIZE // 2, np.full((STEPS + 1, SIZE, SIZE, 3), 60, np.uint8)
    places = []
    for k in range(STEPS + 1):
        if k > 1:
            column = int(np.clip(column + 12 * left_or_right[k - 2], 4, SIZE - 4))
        frames[k, 8:24, column - 4 : column + 4] = 250
        if k and closed[k - 1]:
            frames[k, ..., 1:] //= 3
        places.append(column / SIZE)
    actions = np.zeros((STEPS, 7), np.float32)
    actions[:, 1], actions[:, 6] = left_or_right, np.where(closed, -1, 1)
    agent_pos = np.zeros((STEPS + 1, 7), np.float32)
    agent_pos[:, 1] = places
    return Episode(frames, to_physical(actions), agent_pos, "go", str(index), "commanded", 1)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("inverse")
    cache = build_clip_cache((episode(k, rng) for k in range(60)), folder / "cache")
    config = InverseTrainConfig(str(tiny_checkpoint), num_held_out=10, num_steps=300, learning_rate=3e-3)
    out = folder / "made"
    errors = train_inverse_dynamics([str(cache.directory)], out, config, command="the command")
    return out, errors, config, cache


def test_infers_what_was_told_in_episodes_it_has_not_seen(trained):
    out, errors, _, _ = trained
    assert errors["motion_r2"] > 0.5  # the square does not always move: it stops at the edge
    assert errors["gripper_accuracy"] > 0.75
    assert errors["pose_mm"] < 40  # of which y alone varies, by 250
    card = (out / "CARD.md").read_text()
    assert "50 episodes" in card and "10 held-out" in card and "the command" in card


def test_comes_back_from_its_folder_and_is_no_policy(trained, tmp_path):
    out, _, _, cache = trained
    network, frames = load_inverse_dynamics(out), np.array(cache.frames[: STEPS + 1])
    actions, agent_pos = network.infer(frames)
    assert actions.shape == (STEPS, 7) and agent_pos.shape == (STEPS + 1, 7)
    assert actions.dtype == agent_pos.dtype == np.float32
    again = load_inverse_dynamics(out)
    for found, same in zip(again.infer(frames), (actions, agent_pos), strict=True):
        np.testing.assert_array_equal(found, same)
    with pytest.raises(ValueError, match="kind must be one of"):
        load_policy(out)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "bc"}))
    with pytest.raises(ValueError, match="must hold inverse dynamics .* got 'bc'"):
        load_inverse_dynamics(tmp_path)


def test_an_action_is_read_from_its_frame_and_those_that_follow(tiny_checkpoint):
    torch.manual_seed(0)
    network = InverseDynamics(InverseDynamicsConfig(str(tiny_checkpoint)))
    frames = np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)
    changed = frames.copy()
    changed[4] = 255 - changed[4]
    seen = [network.see(network.view.of({"pixels": each})) for each in (frames, changed)]
    assert (seen[0] != seen[1]).any(dim=1).tolist() == [False] * 4 + [True] + [False] * 2
    windows = torch.arange(6)[:, None] + torch.arange(3)
    logits = [network.actions(each[windows.clamp(max=6)]) for each in seen]
    assert (logits[0] != logits[1]).any(dim=1).tolist() == [False, False, True, True, True, False]
    expected = network.actions(seen[0][windows.clamp(max=6)]).clamp(-1, 1).detach().numpy()
    expected[:, -1] = np.where(expected[:, -1] > 0, 1, -1)
    np.testing.assert_allclose(network.infer(frames)[0], to_physical(expected), atol=1e-6)
    with pytest.raises(ValueError, match="num_frames must be at least 2, got 1"):
        InverseDynamicsConfig(num_frames=1)


def test_labels_keep_what_is_known(trained):
    out, _, _, _ = trained
    known = episode(5, np.random.default_rng(7))
    made = load_inverse_dynamics(out).label(known)
    assert (made.convention, made.command_lag, made.instruction) == ("inferred", 1, "go")
    np.testing.assert_array_equal(made.agent_pos, known.agent_pos)
    found = load_inverse_dynamics(out).label(replace(known, agent_pos=None))
    assert np.abs(found.agent_pos[:, 1] - known.agent_pos[:, 1]).mean() < 0.15
    np.testing.assert_array_equal(found.actions, made.actions)


def test_a_command_makes_demonstrations_of_video(trained, tmp_path):
    out, _, _, _ = trained
    (tmp_path / "videos").mkdir()
    filmed = [episode(k, np.random.default_rng(k)) for k in (100, 101)]
    for k, each in enumerate(filmed):
        (tmp_path / "videos" / f"{k}.mp4").write_bytes(encode_video(each.frames, 5))
    settings = {"data": str(tmp_path / "videos"), "out": str(tmp_path / "made"), "workers": 0}
    with pytest.raises(ValueError, match="actions_by infers them"):
        convert(ConvertConfig(**settings | {"out": str(tmp_path / "none")}, size=SIZE))
    with pytest.raises(ValueError, match="either relabelled or inferred"):
        ConvertConfig(**settings, relabel=True, actions_by=str(out))
    convert(ConvertConfig(**settings, size=SIZE, actions_by=str(out)))
    made = open_dataset(tmp_path / "made")
    assert [each.convention for each in made] == ["inferred"] * 2
    sideways = np.concatenate([each.actions[:-2, 1] for each in made])
    told = np.concatenate([each.actions[:-2, 1] for each in filmed])
    assert np.corrcoef(sideways, told)[0, 1] > 0.5


def test_goes_on_where_it_was_killed_and_refuses_another_run(trained, tiny_checkpoint, tmp_path):
    _, _, config, cache = trained
    caches, short = [str(cache.directory)], replace(config, num_steps=20, num_episodes=5)
    once = train_inverse_dynamics(caches, tmp_path / "once", short)

    def killed(step: int, _: dict) -> None:
        raise KeyboardInterrupt

    from policies import inverse_train

    settings = inverse_train.TrainConfig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverse_train, "TrainConfig", lambda **given: settings(**given, checkpoint_every=7, log_every=10))
        with pytest.raises(KeyboardInterrupt):
            train_inverse_dynamics(caches, tmp_path / "twice", short, on_log=killed)
        assert train_inverse_dynamics(caches, tmp_path / "twice", short) == once
    with pytest.raises(ValueError, match="other settings"):
        train_inverse_dynamics(caches, tmp_path / "twice", replace(short, seed=1))
    with pytest.raises(ValueError, match="need more than num_held_out=60 episodes, got 60"):
        train_inverse_dynamics(caches, tmp_path / "none", replace(short, num_held_out=60))
