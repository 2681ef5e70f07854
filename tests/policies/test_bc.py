import json

import numpy as np
import pytest
import torch

from policies.actor import ActorPredictor, instruction_id
from policies.bc import BCConfig, BCNetwork, load_bc

CONFIG = BCConfig(["push the cube", "stack the cubes"], image_size=32, width=8, num_keypoints=4, hidden_dim=16)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return BCNetwork(CONFIG)


def obs(num_rows, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 256, (num_rows, size, size, 3), dtype=np.uint8),
        "agent_pos": rng.normal(size=(num_rows, 7)).astype(np.float32),
    }


def test_a_keypoint_is_where_its_feature_is(network):
    """With heat on one cell only, the coordinates are that cell's: x to the right, y down, -1 to 1."""
    for parameter in network.parameters():
        parameter.data.zero_()
    network.log_sharpness.data += 8.0
    network.queries.bias.data += 1.0
    for conv in (network.stem, network.down):
        conv.weight.data.fill_(0.02)  # brightness goes through
    network.norm.weight.data.fill_(1.0)
    pixels = torch.zeros(1, 32, 32, 3)
    pixels[0, 4:8, 20:24] = 255  # cell (row 1, column 5) of 8 x 8
    x, y = network.see(pixels, torch.zeros(1, CONFIG.instruction_dim))[0, [0, 4]].tolist()
    assert x == pytest.approx(-1 + 2 * 5 / 7, abs=0.05)
    assert y == pytest.approx(-1 + 2 * 1 / 7, abs=0.05)


def test_shapes_and_range(network):
    chunk = ActorPredictor(network).predict(obs(3), "push the cube")
    assert chunk.shape == (3, CONFIG.chunk_len, 7)
    assert chunk.dtype == np.float32
    assert np.abs(chunk).max() <= 1
    assert set(np.unique(chunk[..., -1])) <= {-1.0, 1.0}


def test_the_gripper_opens_on_a_positive_logit(network):
    network.action_head[-1].weight.data.zero_()
    for bias, expected in ((0.3, 1.0), (-0.3, -1.0)):
        network.action_head[-1].bias.data.fill_(bias)
        chunk = ActorPredictor(network).predict(obs(1), "push the cube")
        assert chunk[0, 0].tolist() == pytest.approx([bias] * 6 + [expected])


def test_a_batch_equals_its_rows(network):
    predictor = ActorPredictor(network)
    batch = obs(4)
    whole = predictor.predict(batch, "push the cube")
    rows = [predictor.predict({k: v[i : i + 1] for k, v in batch.items()}, "push the cube")[0] for i in range(4)]
    np.testing.assert_allclose(whole, np.stack(rows), atol=1e-5)


def test_the_instruction_matters(network):
    torch.nn.init.normal_(network.instruction.weight, std=3.0)
    predictor = ActorPredictor(network)
    first, second = (predictor.predict(obs(1), name) for name in CONFIG.instructions)
    assert np.abs(first - second).max() > 1e-3


def test_save_and_load_act_alike(network, tmp_path):
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    network.save(tmp_path / "policy")
    policy = load_bc(tmp_path / "policy")
    np.testing.assert_array_equal(
        policy.predictor.predict(obs(2), "stack the cubes"), ActorPredictor(network).predict(obs(2), "stack the cubes")
    )
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["config.json", "model.safetensors"]


def test_names_the_nearest_instruction():
    assert instruction_id(CONFIG, "stack the cubes") == 1
    with pytest.raises(ValueError, match="'stack cubes'; nearest known: 'stack the cubes'"):
        instruction_id(CONFIG, "stack cubes")


def test_refuses_other_frame_sizes(network):
    with pytest.raises(ValueError, match="32, 32, 3"):
        ActorPredictor(network).predict(obs(1, size=64), "push the cube")


@pytest.mark.parametrize("damage", ["truncated", "missing", "other sizes"])
def test_a_damaged_checkpoint_is_named(network, tmp_path, damage):
    network.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_dim": 17}))
    with pytest.raises(ValueError, match="model.safetensors"):
        load_bc(tmp_path)


def test_an_unknown_setting_is_named(network, tmp_path):
    network.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dropout": 0.1}))
    with pytest.raises(ValueError, match="config.json.*dropout"):
        load_bc(tmp_path)


def test_refuses_impossible_configurations():
    with pytest.raises(ValueError, match="at least one instruction"):
        BCNetwork(BCConfig([]))
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        BCNetwork(BCConfig(["go"], image_size=30))
    with pytest.raises(ValueError, match=r"1..2 \(chunk_len\), got 3"):
        BCNetwork(BCConfig(["go"], chunk_len=2, num_executed=3))
