import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchrl")

from policies import load_policy  # noqa: E402
from policies.torchrl_policy import TorchRLConfig, TorchRLPolicy, build_actor, save_torchrl  # noqa: E402

CONFIG = TorchRLConfig(image_size=64, width=4, hidden_dims=[16])


@pytest.fixture
def actor():
    torch.manual_seed(0)
    return build_actor(CONFIG)


def obs(num_rows):
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (num_rows, 64, 64, 3), dtype=np.uint8),
        "agent_pos": rng.normal(size=(num_rows, 7)).astype(np.float32),
    }


def test_acts_with_the_mode_of_the_distribution(actor):
    policy = TorchRLPolicy(actor)
    policy.reset(3, instruction="go", seeds=[0, 1, 2])
    batch = obs(3)
    actions = policy.act(batch)
    mean, _ = actor[0].module(*(torch.from_numpy(batch[key]) for key in ("pixels", "agent_pos")))
    np.testing.assert_allclose(actions, torch.tanh(mean).detach().numpy(), atol=1e-5)
    np.testing.assert_array_equal(policy.act(batch), actions)
    one = policy.act({key: value[1:2] for key, value in batch.items()})
    np.testing.assert_allclose(one, actions[1:2], atol=1e-5)


def test_save_and_load_act_alike(actor, tmp_path):
    save_torchrl(actor, CONFIG, tmp_path)
    np.testing.assert_array_equal(load_policy(tmp_path).act(obs(2)), TorchRLPolicy(actor).act(obs(2)))


@pytest.mark.parametrize("damage", ["truncated", "other sizes"])
def test_a_damaged_checkpoint_is_named(actor, tmp_path, damage):
    save_torchrl(actor, CONFIG, tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_dims": [8]}))
    with pytest.raises(ValueError, match="model.safetensors"):
        load_policy(tmp_path)
