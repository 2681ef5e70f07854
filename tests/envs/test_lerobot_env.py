import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from lerobot.configs import FeatureType, PolicyFeature  # noqa: E402
from lerobot.envs.configs import EnvConfig  # noqa: E402
from lerobot.envs.factory import make_env  # noqa: E402

from envs.lerobot_env import LeRobotVectorEnv, MujocoBridgeConfig, WorldModelBridgeConfig  # noqa: E402
from envs.world_model_bridge import WorldModelBridgeVectorEnv  # noqa: E402
from wfm_core.data import open_dataset  # noqa: E402
from wfm_core.data.actions import ACTION_HIGH, ACTION_LOW, to_physical  # noqa: E402

ROOT = Path(__file__).parents[2]


def imagined(num_envs: int, mode: str = "SameStep", **kwargs) -> WorldModelBridgeVectorEnv:
    return WorldModelBridgeVectorEnv(num_envs, "scripted", "push_cube", autoreset_mode=mode, **kwargs)


def test_keys_and_units_are_those_of_recorded_data():
    ours, plain = LeRobotVectorEnv(imagined(2, max_episode_steps=2)), imagined(2, max_episode_steps=2)
    obs, _ = ours.reset(seed=[3, 4])
    expected, _ = plain.reset(seed=[3, 4])
    random = np.random.default_rng(0)
    for step in range(3):
        np.testing.assert_array_equal(obs["pixels"]["image_0"], expected["pixels"])
        np.testing.assert_allclose(obs["agent_pos"], expected["agent_pos"], atol=1e-6)
        np.testing.assert_array_equal(obs["observation.state"], obs["agent_pos"])
        assert obs in ours.observation_space
        actions = random.uniform(-0.9, 0.9, (2, 7)).astype(np.float32)
        obs, _, _, truncated, info = ours.step(to_physical(actions))
        expected, *_ = plain.step(actions)
        assert truncated.all() == (step == 1) == ("final_obs" in info)
        if truncated.any():
            assert info["final_obs"][0]["pixels"]["image_0"].shape == obs["pixels"]["image_0"].shape[1:]
    assert ours.call("task_description") == (plain.task_description,) * 2
    assert ours.unwrapped.metadata["render_fps"] == 5 and ours.call("_max_episode_steps") == (2, 2)
    np.testing.assert_array_equal(ours.single_action_space.low, ACTION_LOW)
    with pytest.raises(ValueError, match="must have autoreset_mode='SameStep', got NEXT_STEP"):
        LeRobotVectorEnv(imagined(1, "NextStep"))


def test_lerobot_makes_either_twin(monkeypatch):
    made = make_env(WorldModelBridgeConfig(task="stack_cubes", world_model="scripted"), n_envs=3)
    env = made["worldmodel_bridge"][0]
    assert env.num_envs == 3 and "green block" in env.call("task_description")[0]
    import envs.mujoco_bridge as twin

    calls = []
    monkeypatch.setattr(twin, "MujocoBridgeVectorEnv", lambda n, **kw: calls.append((n, kw["task"])) or imagined(n))
    make_env(MujocoBridgeConfig(task="push_cube"), n_envs=2)
    assert calls == [(2, "push_cube")]
    assert EnvConfig.get_choice_class("mujoco_bridge") is MujocoBridgeConfig


@pytest.mark.timeout(900)
def test_lerobot_eval_runs_unchanged_and_records_imagined_rollouts(tmp_path):
    from lerobot.policies import make_policy_config, make_pre_post_processors
    from lerobot.policies.factory import get_policy_class

    torch.manual_seed(0)
    config = make_policy_config(
        "act", device="cpu", push_to_hub=False, chunk_size=4, n_action_steps=2, dim_model=16, n_heads=2,
        dim_feedforward=16, n_encoder_layers=1, use_vae=False, pretrained_backbone_weights=None,
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (7,)),
            "observation.images.image_0": PolicyFeature(FeatureType.VISUAL, (3, 128, 128)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )  # fmt: skip
    half = torch.from_numpy(ACTION_HIGH - ACTION_LOW) / 2
    stats = {
        "observation.state": {"mean": torch.zeros(7), "std": torch.ones(7)},
        "action": {"mean": torch.from_numpy(ACTION_LOW) + half, "std": half / 4},
        "observation.images.image_0": {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.3)},
    }
    for part in (get_policy_class("act")(config), *make_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(tmp_path / "act")
    settings = {
        "env.discover_packages_path": "envs.lerobot_env", "env.type": "worldmodel_bridge", "env.task": "push_cube",
        "env.world_model": "scripted", "policy.path": tmp_path / "act", "policy.device": "cpu", "eval.n_episodes": 2,
        "eval.batch_size": 2, "eval.recording": "true", "output_dir": tmp_path / "out",
    }  # fmt: skip
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_eval"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2
    recorded = sorted(path.parents[1] for path in (tmp_path / "out").rglob("meta/info.json"))
    assert len(recorded) == 2
    episode = open_dataset(recorded[0])[0]
    assert episode.frames.shape[1:] == (128, 128, 3) and episode.instruction.startswith("push")
    assert (np.abs(episode.actions[:, :6]) <= ACTION_HIGH[:6] + 1e-3).all() and np.isfinite(episode.agent_pos).all()
