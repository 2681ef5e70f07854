import numpy as np
import pytest

pytest.importorskip("torchrl")

from envs.torchrl_env import TorchRLBridgeEnv  # noqa: E402
from envs.world_model_bridge import WorldModelBridgeVectorEnv  # noqa: E402
from policies.torchrl_train import TorchRLTrainConfig, train_torchrl  # noqa: E402
from wfm_core.models.scripted import ScriptedWorldModel  # noqa: E402
from worldsim.scripted_heads import ScriptedHeads  # noqa: E402
from worldsim.simulator import Calibration, WorldSim  # noqa: E402


def test_it_learns(tmp_path):
    sim = WorldSim(ScriptedWorldModel(), ScriptedHeads(tolerance=0.08), calibration=Calibration())
    env = WorldModelBridgeVectorEnv(
        32,
        sim,
        "reach_target",
        observation="latents",
        reward="progress",
        max_episode_steps=16,
        uncertainty_limit=np.inf,
    )
    env.num_initial_states = 1  # or nobody would know where the target is
    told = []
    config = TorchRLTrainConfig(
        num_steps=14 * 32 * 16, rollout_steps=16, batch_size=64, gamma=0.9, learning_rate=1e-3, hidden_dims=[32]
    )
    train_torchrl(
        TorchRLBridgeEnv(env), config, tmp_path / "ppo", made_of={}, world_model="scripted",
        on_update=lambda steps, row: told.append(row["success"]),
    )  # fmt: skip
    assert len(told) == 14 and np.mean(told[-3:]) > told[0] + 0.2
