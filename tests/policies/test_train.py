import json

import numpy as np
import pytest
import torch

from policies import load_policy
from policies.bc import BCConfig, BCNetwork
from policies.demonstrations import load_demonstrations
from policies.train import (
    BCTrainConfig,
    WFMTrainConfig,
    clone,
    demonstrated,
    latent_sight,
    make_batch,
    pixel_sight,
    shifted,
)
from policies.wfm_policy import WFMPolicyNetwork
from wfm_core.checkpoint import load_patch_tokenizer
from wfm_core.data.actions import to_physical
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.tokenizers.patch import to_float

SIZE = 32
TINY = BCTrainConfig(num_demos=20, num_held_out=5, num_steps=150, batch_size=32, width=8, chunk_len=2, num_executed=1)


def square_episode(index, rng):
    """A square lies left or right; the action is towards it, sideways; the gripper closes when it is there."""
    side = rng.choice([-1.0, 1.0])
    frames = np.full((7, SIZE, SIZE, 3), rng.integers(60, 120), np.uint8)
    column = int(SIZE / 2 + side * SIZE / 4)
    row = rng.integers(8, SIZE - 8)
    frames[:, row - 3 : row + 3, column - 3 : column + 3] = (250, 30, 30)
    actions = np.zeros((6, 7), np.float32)
    actions[:4, 1], actions[:, 6] = side * 0.8, [1, 1, 1, 1, -1, -1]
    agent_pos = np.zeros((7, 7), np.float32)
    agent_pos[1:, 1] = np.cumsum(to_physical(actions)[:, 1])
    agent_pos[:, 6] = [1, 1, 1, 1, 1, 0, 0]
    return Episode(
        frames, to_physical(actions), agent_pos, "go", str(index), "commanded", 0,
        {"success": np.arange(7) > 4}, {"behaviour": "expert"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "cache"
    build_clip_cache((square_episode(i, rng) for i in range(25)), path)
    return path


@pytest.fixture(scope="module")
def trained(cache_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("policies") / "bc"
    return out, clone([str(cache_dir)], out, TINY, command="worldsim-train-policy recipe=bc")


def test_learns_to_look(trained, cache_dir):
    """On squares it has not seen the clone goes to the right side, from the pixels alone: agent_pos starts alike."""
    out, errors = trained
    assert errors["translation_mm"] < 3  # always going the mean way would err by 9
    assert errors["gripper_accuracy"] > 0.8
    policy = load_policy(out)
    rng = np.random.default_rng(99)
    episodes = [square_episode(i, rng) for i in range(20)]
    policy.reset(20, instruction="go", seeds=range(20))
    actions = policy.act(
        {"pixels": np.stack([e.frames[0] for e in episodes]), "agent_pos": np.stack([e.agent_pos[0] for e in episodes])}
    )
    sides = np.sign([e.actions[0, 1] for e in episodes])
    assert (np.sign(actions[:, 1]) == sides).mean() >= 0.95


def test_the_card_says_how(trained):
    out, _ = trained
    card = (out / "CARD.md").read_text()
    assert "worldsim-train-policy recipe=bc" in card
    assert "20 successful demonstrations" in card
    assert json.loads((out / "config.json").read_text())["instructions"] == ["go"]


def test_a_run_directory_belongs_to_one_run(trained, cache_dir):
    out, _ = trained
    with pytest.raises(ValueError, match="belongs to another run"):
        clone([str(cache_dir)], out, BCTrainConfig(num_demos=3))


def test_the_same_run_gives_the_same_policy(cache_dir, tmp_path):
    short = BCTrainConfig(num_demos=4, num_steps=3, batch_size=4, width=4, chunk_len=2, num_executed=1)
    first, second = (clone([str(cache_dir)], tmp_path / name, short) for name in "ab")
    assert first == second
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_batches_belong_together(cache_dir):
    """Frame, state, actions and waypoint of one row come from one moment."""
    demos = load_demonstrations([cache_dir], ["expert"])
    config = BCTrainConfig(agent_pos_noise=0.0, max_shift=0)
    indices = np.array([demos.first[9], demos.first[2] + 3])
    batch = make_batch(demos, pixel_sight(demos, config), indices, config, np.random.default_rng(0), BCConfig(["go"]))
    order = np.sort(indices)
    np.testing.assert_array_equal(batch["agent_pos"], demos.agent_pos[order])
    np.testing.assert_array_equal(batch["waypoint"], demos.waypoint[order])
    np.testing.assert_array_equal(batch["actions"], demos.chunks(order, config.chunk_len))
    for row, frame in zip(batch["picture"], demos.frames(order), strict=True):
        seen, true = row[..., 0].flatten().numpy(), frame[..., 0].flatten().astype(float)
        assert np.corrcoef(seen, true)[0, 1] > 0.9


def test_those_who_learn_otherwise_are_shown_what_they_were_cloned_from(cache_dir):
    demos = load_demonstrations([cache_dir], ["expert"])
    chosen, _ = demos.split(3, 4, 5)
    network = BCNetwork(
        BCConfig(["go"], image_size=SIZE, width=4, num_keypoints=4, hidden_dim=8, chunk_len=2, num_executed=1)
    )
    caches = [ClipCache(cache_dir)]
    batch_fn = demonstrated(network, caches, ["go"], 3, 5)
    batch, again = batch_fn(7), demonstrated(network, caches, ["go"], 3, 5)(7)
    assert all(torch.equal(batch[name], again[name]) for name in batch) and batch["actions"].shape == (64, 2, 7)
    assert not torch.equal(batch["waypoint"], batch_fn(8)["waypoint"])
    known = chosen.waypoint[chosen.frame_indices()]
    assert (batch["waypoint"].numpy()[:, None] == known).all(axis=-1).any(axis=1).all()
    network.config.instructions = ["stop"]
    with pytest.raises(ValueError, match=r"knows \['stop'\], demonstrations are of \['go'\]"):
        demonstrated(network, caches, ["stop"], 3, 5)


def test_noise_is_in_units_of_the_data(cache_dir):
    demos = load_demonstrations([cache_dir], ["expert"])
    network = BCConfig(["go"], agent_pos_std=[0.1, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    indices = np.repeat(demos.first[:1], 400)
    config = BCTrainConfig(agent_pos_noise=0.5)
    batch = make_batch(demos, pixel_sight(demos, config), indices, config, np.random.default_rng(0), network)
    spread = (batch["agent_pos"] - torch.from_numpy(demos.agent_pos[indices])).std(dim=0)
    np.testing.assert_allclose(spread, 0.5 * np.array(network.agent_pos_std), rtol=0.2)


def test_shifts_move_the_picture():
    frames = np.zeros((50, 9, 9, 3), np.uint8)
    frames[:, 4, 4] = 255
    moved = shifted(frames, 2, np.random.default_rng(0))
    spots = [tuple(int(x[0]) for x in np.nonzero(frame[..., 0])) for frame in moved]
    assert all(len(np.nonzero(frame[..., 0])[0]) in (1, 2) for frame in moved)
    offsets = {(y - 4, x - 4) for y, x in spots}
    assert {abs(d) for offset in offsets for d in offset} <= {0, 1, 2}
    assert len(offsets) > 10
    np.testing.assert_array_equal(shifted(frames, 0, np.random.default_rng(0)), frames)


def test_clones_from_latents(cache_dir, tiny_checkpoint, tmp_path):
    """The tokens of a random encoder tell left from right; with its trunk's weights or without, the clone finds out."""
    for initialised in (True, False):
        config = WFMTrainConfig(
            num_demos=20, num_held_out=5, num_steps=400, batch_size=32, chunk_len=2, num_executed=1, num_views=2,
            world_model=str(tiny_checkpoint), initialised=initialised, max_shift=0,
        )  # fmt: skip
        errors = clone([str(cache_dir)], tmp_path / str(initialised), config)
        assert errors["translation_mm"] < 6.5  # always going the mean way would err by 9
    assert "latents" in (tmp_path / "True" / "CARD.md").read_text()
    first, second = (load_policy(tmp_path / str(each)).predictor.network for each in (True, False))
    assert (first.trunk.position - second.trunk.position).abs().max() > 0.1


def test_a_frozen_trunk_stays_the_world_models(cache_dir, tiny_checkpoint, tmp_path):
    config = WFMTrainConfig(
        num_demos=8, num_held_out=2, num_steps=10, chunk_len=2, num_executed=1, num_views=1,
        world_model=str(tiny_checkpoint), frozen=True,
    )  # fmt: skip
    clone([str(cache_dir)], tmp_path / "policy", config)
    network = load_policy(tmp_path / "policy").predictor.network
    born = WFMPolicyNetwork(network.config).born()
    for name, value in born.trunk.state_dict().items():
        torch.testing.assert_close(network.trunk.state_dict()[name], value, atol=1e-3, rtol=1e-3)  # kept as float16
    assert (network.queries.weight - born.queries.weight).abs().max() > 1e-3


def test_frames_are_encoded_once_and_seen_in_several_versions(cache_dir, tiny_checkpoint):
    demos = load_demonstrations([cache_dir], ["expert"])
    tokenizer = load_patch_tokenizer(tiny_checkpoint)
    indices = demos.frame_indices()[[3, 50]]
    plain = latent_sight(demos, WFMTrainConfig(num_views=1), tokenizer)
    expected = tokenizer.encode(to_float(torch.from_numpy(demos.frames(indices))))
    torch.testing.assert_close(plain(indices, np.random.default_rng(0)), expected, atol=1e-3, rtol=0)
    several = latent_sight(demos, WFMTrainConfig(num_views=3), tokenizer)
    everywhere = demos.frame_indices()
    draws = torch.stack([several(everywhere, np.random.default_rng(seed)) for seed in range(20)])
    versions = [len({tuple(row.tolist()) for row in draws[:, k].flatten(1)}) for k in range(len(everywhere))]
    assert max(versions) == 3
