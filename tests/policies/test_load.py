import json

import numpy as np
import pytest
import torch

import policies.load
from policies import load_policy, policy_hash, shipped_policies
from policies.bc import BCConfig, BCNetwork

INSTRUCTION = "push the cube"


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """A folder of shipped checkpoints with two small policies."""
    monkeypatch.setattr(policies.load, "CHECKPOINT_DIR", tmp_path)
    for seed, name in enumerate(("bc_few", "bc_many")):
        torch.manual_seed(seed)
        BCNetwork(BCConfig([INSTRUCTION], image_size=32, width=8, hidden_dim=16)).save(tmp_path / name)
    return tmp_path


def act(policy):
    policy.reset(2, instruction=INSTRUCTION, seeds=[0, 1])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return policy.act({"pixels": pixels, "agent_pos": np.zeros((2, 7), np.float32)})


def test_loads_by_name_and_by_path(checkpoints):
    assert shipped_policies() == ["bc_few", "bc_many"]
    by_name, by_path = act(load_policy("bc_many")), act(load_policy(checkpoints / "bc_many"))
    np.testing.assert_array_equal(by_name, by_path)
    assert by_name.shape == (2, 7)
    assert np.abs(by_name - act(load_policy("bc_few"))).max() > 0


def test_an_unknown_name_gets_the_nearest(checkpoints):
    with pytest.raises(ValueError, match="'bc_mayn'; nearest shipped policy: 'bc_many'"):
        load_policy("bc_mayn")


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_damaged_configuration_is_named(checkpoints, content):
    path = checkpoints / "bc_few" / "config.json"
    folder = checkpoints / "bc_few"
    path.write_text(content) if content else path.unlink()
    with pytest.raises(ValueError, match="bc_few/config.json"):
        load_policy(folder)


def test_an_unknown_kind_gets_the_nearest(checkpoints):
    (checkpoints / "bc_few" / "config.json").write_text(json.dumps({"kind": "torch_rl"}))
    with pytest.raises(ValueError, match="'torch_rl'; nearest: 'torchrl'"):
        load_policy("bc_few")


def test_the_hash_is_of_content_only(checkpoints):
    before = policy_hash("bc_few")
    assert before != policy_hash("bc_many")
    assert len(before) == 16
    (checkpoints / "bc_few" / "CARD.md").write_text("a card")
    (checkpoints / "bc_few").rename(checkpoints / "renamed")
    assert policy_hash(checkpoints / "renamed") == before
    weights = checkpoints / "renamed" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert policy_hash("renamed") != before
