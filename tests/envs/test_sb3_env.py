import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.vec_env import VecMonitor  # noqa: E402

from envs.sb3_env import SB3VecEnv  # noqa: E402
from envs.world_model_bridge import WorldModelBridgeVectorEnv  # noqa: E402


def imagined(num_envs: int, mode: str = "SameStep", **kwargs) -> WorldModelBridgeVectorEnv:
    return WorldModelBridgeVectorEnv(num_envs, "scripted", "reach_target", autoreset_mode=mode, **kwargs)


def test_steps_are_the_vector_envs_and_ends_are_told_as_sb3_wants_them():
    ours = SB3VecEnv(imagined(3, max_episode_steps=4, observation="latents"))
    plain = imagined(3, max_episode_steps=4, observation="latents")
    ours.seed(5)
    ours.set_options({"initial_state": 2})
    obs = ours.reset()
    expected, _ = plain.reset(seed=[5, 6, 7], options={"initial_state": 2})
    assert [info["initial_state"] for info in ours.reset_infos] == [2, 2, 2]
    random, ends = np.random.default_rng(0), 0
    for _ in range(9):
        for key in obs:
            np.testing.assert_array_equal(obs[key], expected[key])
        actions = random.uniform(-1, 1, (3, 7)).astype(np.float32)
        obs, reward, ended, infos = ours.step(actions)
        expected, its_reward, terminated, truncated, info = plain.step(actions)
        np.testing.assert_array_equal(reward, its_reward.astype(np.float32))
        np.testing.assert_array_equal(ended, terminated | truncated)
        for row in range(3):
            assert infos[row]["TimeLimit.truncated"] == truncated[row]
            assert ("terminal_observation" in infos[row]) == ended[row]
            if ended[row]:
                ends += 1
                final = {key: value[row] for key, value in info["final_info"].items()}
                assert infos[row]["elapsed_steps"] == final["elapsed_steps"] > 0
                assert infos[row]["end_reason"] == final["end_reason"] != ""
                assert ours.reset_infos[row]["episode_seed"] == info["episode_seed"][row]
                np.testing.assert_array_equal(
                    infos[row]["terminal_observation"]["agent_pos"], info["final_obs"][row]["agent_pos"]
                )
            else:
                assert infos[row]["elapsed_steps"] == info["elapsed_steps"][row]
    assert ends >= 6
    ours.close()


def test_a_seed_and_options_count_once():
    env = SB3VecEnv(imagined(2, observation="latents"))
    env.seed(3)
    env.set_options({"initial_state": 1})
    first = env.reset()
    second = env.reset()
    assert np.abs(first["latents"] - second["latents"]).max() > 0
    env.seed(3)
    env.set_options({"initial_state": 1})
    np.testing.assert_array_equal(env.reset()["latents"], first["latents"])


def test_rows_share_the_env():
    env = SB3VecEnv(imagined(3, render_mode="rgb_array"))
    env.reset()
    assert env.get_attr("task_description", [0, 2]) == [env.env.task_description] * 2
    assert len(env.env_method("render", indices=1)) == 1 and env.env_is_wrapped(object) == [False] * 3  # ty: ignore
    env.set_attr("task_description", "other")
    assert env.env.task_description == "other"
    with pytest.raises(ValueError, match=r"must be all of 3, got \[0\]"):
        env.set_attr("task_description", "other", [0])
    assert np.asarray(env.get_images()).shape == (3, *env.observation_space["pixels"].shape)  # ty: ignore
    assert env.render("rgb_array").dtype == np.uint8


def test_another_autoreset_mode_is_refused():
    with pytest.raises(ValueError, match="must have autoreset_mode='SameStep', got NEXT_STEP"):
        SB3VecEnv(imagined(1, "NextStep"))


def test_ppo_learns_in_it():
    def env(rows: int) -> VecMonitor:
        # The latents of the scripted model are where the arm is; one state, or there would be one target for each.
        rows = imagined(rows, observation="latents", uncertainty_limit=np.inf, max_episode_steps=20)
        rows.num_initial_states = 1
        return VecMonitor(SB3VecEnv(rows))

    settings = {"n_steps": 32, "batch_size": 256, "gamma": 0.9, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}
    model = PPO("MultiInputPolicy", env(32), **settings)
    before, _ = evaluate_policy(model, env(4), n_eval_episodes=4)
    model.learn(16 * 1024)
    after, _ = evaluate_policy(model, env(4), n_eval_episodes=4)
    assert after > 1.3 * before
