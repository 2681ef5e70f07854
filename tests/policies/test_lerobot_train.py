import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from policies import load_policy  # noqa: E402
from policies.bc import BCConfig, BCNetwork  # noqa: E402
from policies.demonstrations import load_demonstrations  # noqa: E402
from policies.frame_encoder import KeypointEncoder  # noqa: E402
from policies.lerobot_train import (  # noqa: E402
    MIN_STATE_STD,
    ACTTrainConfig,
    DiffusionTrainConfig,
    train_lerobot,
    write_feature_dataset,
)
from wfm_core.data.clip_cache import build_clip_cache  # noqa: E402
from wfm_core.data.episode import Episode  # noqa: E402

INSTRUCTIONS = ["go", "stop"]
SHORT: dict[str, Any] = {"num_held_out": 1, "num_steps": 2, "batch_size": 4, "num_views": 2}
TINY = ACTTrainConfig(**SHORT, dim_model=16, num_layers=1, chunk_len=3)
TINY_DIFFUSION = DiffusionTrainConfig(**SHORT, chunk_len=4, down_dims=[16, 16], num_inference_steps=2)


@pytest.fixture
def cache_dir(tmp_path):
    rng = np.random.default_rng(0)

    def episodes():
        for index in range(6):
            actions = rng.uniform(-0.02, 0.02, (5, 7)).astype(np.float32)
            actions[:, 6] = rng.integers(0, 2)
            positions = rng.uniform(-0.2, 0.2, (6, 7)).astype(np.float32)
            positions[:, 3] = 0.01  # roll hardly varies
            frames = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
            labels = {"success": np.arange(6) == 5}
            instruction = INSTRUCTIONS[index % 2]
            source: dict[str, Any] = {"convention": "commanded", "command_lag": 0, "meta": {"behaviour": "expert"}}
            yield Episode(frames, actions, positions, instruction, str(index), labels=labels, **source)

    build_clip_cache(episodes(), tmp_path / "cache")
    return str(tmp_path / "cache")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return BCNetwork(BCConfig(INSTRUCTIONS, image_size=32, width=4, num_keypoints=4, hidden_dim=16))


def test_the_data_set_holds_the_demonstrations(cache_dir, network, tmp_path):
    from lerobot.datasets import LeRobotDataset

    demos, encoder = load_demonstrations([cache_dir], ["expert"]), KeypointEncoder(network)
    write_feature_dataset(demos, encoder, tmp_path / "set", TINY)
    dataset: Any = LeRobotDataset("local/set", root=tmp_path / "set", video_backend="pyav")
    assert dataset.num_episodes == 12  # each demonstration in two views
    second = dataset[5]
    frame = demos.first[1]
    np.testing.assert_allclose(second["observation.state"], demos.agent_pos[frame], atol=1e-6)
    assert second["task"] == demos.instructions[demos.instruction_id[frame]]
    expected = encoder.encode(demos.frames(np.array([frame])), second["task"])[0]
    np.testing.assert_allclose(second["observation.environment_state"], expected, atol=1e-5)
    assert second["action"][:6].abs().max() <= 0.02  # physical units
    again = dataset[30 + 5]
    difference = (again["observation.state"] - second["observation.state"]).abs()
    assert 0 < difference.max() < 0.06
    assert torch.equal(again["action"], second["action"])
    stats = json.loads((tmp_path / "set" / "meta" / "stats.json").read_text())
    assert stats["observation.state"]["std"][3] == MIN_STATE_STD
    assert stats["observation.state"]["std"][0] > 0.08


@pytest.mark.parametrize("tiny", [TINY, TINY_DIFFUSION])
def test_lerobot_trains_what_we_load(tiny, cache_dir, network, tmp_path):
    network.save(tmp_path / "encoder")
    config = replace(tiny, encoder=str(tmp_path / "encoder"))
    out = tmp_path / "made"
    errors = train_lerobot([cache_dir], out, config, command="the command")
    assert set(errors) == {"translation_mm", "gripper_accuracy"}
    policy = load_policy(out)
    policy.reset(2, instruction="stop", seeds=[0, 1])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    actions = policy.act({"pixels": pixels, "agent_pos": np.zeros((2, 7), np.float32)})
    assert actions.shape == (2, 7)
    assert np.abs(actions[0] - actions[1]).max() > 0
    card = (out / "CARD.md").read_text()
    assert "the command" in card
    assert f"--policy.type={config.type}" in card
    assert not (out / "train_config.json").exists()
    with pytest.raises(ValueError, match="belongs to another run"):
        train_lerobot([cache_dir], out, replace(config, num_steps=3))


def test_a_diffusion_chunk_can_be_halved_as_often_as_there_are_levels():
    with pytest.raises(ValueError, match=r"chunk_len must be a multiple of 8 for \[8, 8, 8\], got 12"):
        DiffusionTrainConfig(down_dims=[8, 8, 8], chunk_len=12)


def test_needs_one_encoder(cache_dir, tmp_path):
    for config in (ACTTrainConfig(), ACTTrainConfig(encoder="a", world_model="b")):
        with pytest.raises(ValueError, match="either encoder or world_model"):
            train_lerobot([cache_dir], tmp_path / "act", config)
