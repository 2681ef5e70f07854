import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from policies import load_policy
from policies.bc import BCConfig, BCNetwork
from policies.reinforce_config import ReinforceConfig
from policies.sb3_train import SB3TrainConfig
from policies.torchrl_train import TorchRLTrainConfig
from tasks import TASKS
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from worldsim.commands import imagination
from worldsim.commands.imagination import ReinforceCommand, SB3Command, TorchRLCommand, train_in_imagination
from worldsim.commands.train_policy import TrainPolicyCommand, plan, run

TASK = TASKS["reach_target"]
RL = ReinforceConfig(num_updates=2, rollout_steps=6, probe_every=1, batch_size=16)


@pytest.fixture
def start(tmp_path):
    torch.manual_seed(0)
    network = BCNetwork(BCConfig([TASK.instruction], image_size=128, width=4, num_keypoints=4, hidden_dim=16))
    network.save(tmp_path / "start")
    return tmp_path / "start"


def settings(start, **more) -> ReinforceCommand:
    given = {"tasks": [TASK.name], "world_model": "scripted", "num_envs": 3, "starts": "initial", "num_probed": 2}
    return ReinforceCommand(start=str(start), **given | {"horizon": 4, "rl": RL} | more)


def test_a_policy_is_trained_without_touching_the_twin(start, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.setitem(sys.modules, "envs.mujoco_bridge", None)  # whoever imports it fails
    out = tmp_path / "better"
    run(TrainPolicyCommand(recipe="reinforce", out=str(out), reinforce=settings(start)))
    told = json.loads((out / "training.json").read_text())
    assert told["updates"] == 2 and len(told["probes"]) == 3 and told["imagined_steps"] == 2 * 3 * 6
    assert told["twin_probe_steps"] == 0 and all(probe["true"] is None for probe in told["probes"])
    policy = load_policy(out)
    assert policy.predictor.network.config == load_policy(start).predictor.network.config
    assert "36 imagined steps" in (out / "CARD.md").read_text()
    assert "rollout_success" in capsys.readouterr().err
    run(TrainPolicyCommand(recipe="reinforce", out=str(out), reinforce=settings(start)))
    assert "complete" in capsys.readouterr().out


def test_the_twin_is_probed_if_asked_for(start, tmp_path, monkeypatch):
    from envs import mujoco_bridge
    from envs.world_model_bridge import WorldModelBridgeVectorEnv

    jitters = []

    def fake(rows, task, *, jitter, **kwargs):
        jitters.append(jitter)
        return WorldModelBridgeVectorEnv(rows, "scripted", task, **kwargs)

    monkeypatch.setattr(mujoco_bridge, "MujocoBridgeVectorEnv", fake)
    found = train_in_imagination(settings(start, twin_probe=True), [], tmp_path / "out", line="the command")
    assert found["true"] == found["imagined"] and found["twin_probe_steps"] > 0
    assert set(jitters) == {imagination.JITTER}
    assert "true 0.00" in (tmp_path / "out" / "CARD.md").read_text()


def test_rows_begin_in_recordings(start, tmp_path, monkeypatch):
    frames = np.zeros((6, 128, 128, 3), np.uint8)
    agent_pos = np.zeros((6, 7), np.float32)
    success = {"success": np.zeros(6, bool)}
    episode = Episode(frames, np.zeros((5, 7), np.float32), agent_pos, TASK.instruction, "0", "commanded", 0, success)
    cache = build_clip_cache(iter([episode]), tmp_path / "cache")
    arenas = []
    real = imagination.reinforce
    monkeypatch.setattr(imagination, "reinforce", lambda n, a, *args, **kw: arenas.extend(a) or real(n, a, *args, **kw))
    command = settings(start, starts="anywhere", num_starts=7, uncertainty_penalty=0.5)
    train_in_imagination(command, [cache], tmp_path / "out", line="")
    (arena,) = arenas
    assert arena.num_initial_states == 7 and arena.instruction == TASK.instruction
    assert arena.env.rules.reward == "progress" and arena.env.rules.max_episode_steps == 4
    assert arena.env.rules.uncertainty_penalty == 0.5


def test_bad_input_is_told(start, tmp_path):
    with pytest.raises(ValueError, match="needs a policy and tasks, for instance"):
        train_in_imagination(ReinforceCommand(), [], tmp_path / "out", line="")
    with pytest.raises(ValueError, match="starts must be one of"):
        ReinforceCommand(starts="everywhere")
    with pytest.raises(ValueError, match="data must name at least one data set"):
        run(
            TrainPolicyCommand(
                recipe="reinforce", out=str(tmp_path / "o"), reinforce=settings(start, starts="anywhere")
            )
        )
    with pytest.raises(ValueError, match="kind bc or wfm, got 'scripted'"):
        train_in_imagination(settings("scripted"), [], tmp_path / "out", line="")
    with pytest.raises(ValueError, match="reinforce.* settings need recipe=reinforce"):
        plan(TrainPolicyCommand(recipe="bc", reinforce=settings(start)))


def test_sb3_begins_from_nothing_and_resumes(tiny_checkpoint, tmp_path):
    pytest.importorskip("stable_baselines3")
    ppo = SB3TrainConfig(num_steps=48, n_steps=4, batch_size=12, updates_per_part=2, net_arch=[8], n_epochs=2)
    command = SB3Command(
        tasks=[TASK.name],
        world_model=str(tiny_checkpoint),
        num_envs=3,
        starts="initial",
        num_probed=2,
        horizon=4,
        ppo=ppo,
    )
    run(TrainPolicyCommand(recipe="sb3", out=str(tmp_path / "whole"), sb3=command))
    told = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert told["imagined_steps"] == 48 and told["twin_probe_steps"] == 0 and len(told["probes"]) == 1
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["kind"] == "sb3" and config["world_model"] == str(tiny_checkpoint)
    policy = load_policy(tmp_path / "whole")
    policy.reset(2, instruction=TASK.instruction, seeds=[0, 1])
    obs = {"pixels": np.zeros((2, 32, 32, 3), np.uint8), "agent_pos": np.zeros((2, 7), np.float32)}
    assert policy.act(obs).shape == (2, 7)  # encodes the pixels
    short = replace(command, ppo=replace(ppo, num_steps=24))
    train_in_imagination(short, [], tmp_path / "parts", line="")
    train_in_imagination(command, [], tmp_path / "parts", line="")
    from stable_baselines3 import PPO

    whole, parts = (PPO.load(tmp_path / name / "model.zip").policy.state_dict() for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"other settings \(gamma=0.98, now 0.5\)"):
        train_in_imagination(replace(command, ppo=replace(ppo, gamma=0.5)), [], tmp_path / "parts", line="")
    with pytest.raises(ValueError, match="know one task"):
        train_in_imagination(replace(command, tasks=[]), [], tmp_path / "none", line="")


def test_torchrl_begins_from_nothing_and_resumes(tiny_checkpoint, tmp_path):
    pytest.importorskip("torchrl")
    ppo = TorchRLTrainConfig(num_steps=24, rollout_steps=4, batch_size=6, hidden_dims=[8], num_epochs=2)
    command = TorchRLCommand(
        tasks=[TASK.name], world_model=str(tiny_checkpoint), num_envs=3, starts="initial", num_probed=2, horizon=4,
        ppo=ppo,
    )  # fmt: skip
    run(TrainPolicyCommand(recipe="torchrl", out=str(tmp_path / "whole"), torchrl=command))
    policy = load_policy(tmp_path / "whole")
    policy.reset(2, instruction=TASK.instruction, seeds=[0, 1])
    obs = {"pixels": np.zeros((2, 32, 32, 3), np.uint8), "agent_pos": np.zeros((2, 7), np.float32)}
    assert policy.act(obs).shape == (2, 7)  # encodes the pixels
    train_in_imagination(replace(command, ppo=replace(ppo, num_steps=12)), [], tmp_path / "parts", line="")
    train_in_imagination(command, [], tmp_path / "parts", line="")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
    (tmp_path / "parts.run" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="state.safetensors is damaged"):
        train_in_imagination(command, [], tmp_path / "parts", line="")
