import numpy as np
import pytest
import torch

pytest.importorskip("torchrl")

from tensordict import TensorDict  # noqa: E402
from torchrl.envs.utils import check_env_specs  # noqa: E402

from envs.torchrl_env import TorchRLBridgeEnv  # noqa: E402
from envs.world_model_bridge import WorldModelBridgeVectorEnv  # noqa: E402
from worldsim.simulator import load_world_sim  # noqa: E402


def imagined(num_envs: int, world_model="scripted", **kwargs) -> WorldModelBridgeVectorEnv:
    kwargs = {"autoreset_mode": "Disabled", "observation": "latents"} | kwargs
    return WorldModelBridgeVectorEnv(num_envs, world_model, "reach_target", **kwargs)


def acting(td: TensorDict, action: torch.Tensor) -> TensorDict:
    return td.clone().set("action", action.expand(*td.batch_size, 7))


@pytest.mark.parametrize("observation", ["pixels", "latents"])
@pytest.mark.parametrize("world_model", ["scripted", "tiny_checkpoint"])
def test_its_specs_hold(world_model, observation, request):
    if world_model != "scripted":
        world_model = load_world_sim(request.getfixturevalue(world_model), dtype=torch.float32)
    env = TorchRLBridgeEnv(imagined(2, world_model, observation=observation))
    check_env_specs(env)
    assert env.reset()[observation].shape == (2, *env.env.single_observation_space[observation].shape)


def test_steps_are_the_vector_envs():
    plain = imagined(3, max_episode_steps=6, uncertainty_penalty=0.5, reward="progress")
    env = TorchRLBridgeEnv(plain)
    expected, _ = plain.reset(seed=0, options={"initial_state": [0, 1, 2]})
    td = env.reset(initial_state=[0, 1, 2])
    td["state"] = TensorDict(plain.state.as_tensors() | dict(td["state"].select("held", "potential")), [3])
    random = np.random.default_rng(1)
    for step in range(6):
        np.testing.assert_array_equal(td["latents"].numpy(), expected["latents"])
        np.testing.assert_array_equal(td["agent_pos"].numpy(), expected["agent_pos"])
        actions = random.uniform(-1.2, 1.2, (3, 7)).astype(np.float32)
        expected, reward, terminated, truncated, info = plain.step(actions)
        after = env.step(td.set("action", torch.from_numpy(actions)))["next"]
        np.testing.assert_allclose(after["reward"][:, 0], reward, rtol=1e-6)
        for name, value in {"terminated": terminated, "truncated": truncated, "is_success": info["is_success"]}.items():
            np.testing.assert_array_equal(after[name][:, 0], value)
        np.testing.assert_array_equal(after["done"][:, 0], terminated | truncated)
        np.testing.assert_allclose(after["uncertainty"][:, 0], info["uncertainty"])
        assert after["truncated"].any() == (step == 5)
        td = after.exclude("reward")


def test_a_state_can_be_branched_from_with_any_batch_size():
    env = TorchRLBridgeEnv(imagined(1), any_batch=True)
    check_env_specs(env)
    td = env.reset(TensorDict(batch_size=[2]), initial_state=1)
    assert env.reset(initial_state=1)["latents"].shape == td["latents"].shape[1:]
    many = td.unsqueeze(1).expand(2, 5).contiguous()
    actions = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fan = env.step(many.set("action", actions))["next"]
    assert fan["latents"].shape[:2] == (2, 5)
    one = env.step(td.clone().set("action", actions[:, 3]))["next"]
    torch.testing.assert_close(fan["latents"][:, 3], one["latents"], rtol=0, atol=0)
    assert (fan["latents"][:, 0] - fan["latents"][:, 1]).abs().max() > 0
    again = env.step(td.clone().set("action", actions[:, 3]))["next"]  # a step changes nothing that it was given
    torch.testing.assert_close(again["latents"], one["latents"], rtol=0, atol=0)


def test_rows_that_end_are_reset_and_the_others_go_on():
    env = TorchRLBridgeEnv(imagined(3, max_episode_steps=50))
    td = env.reset(initial_state=[0, 1, 2])
    up = acting(td, torch.tensor([0.0, 0, 1, 0, 0, 0, 1]))
    after = env.step(up)["next"].exclude("reward")
    after["_reset"] = torch.tensor([[False], [True], [False]])
    begun = env.reset(after)
    torch.testing.assert_close(begun["latents"][[0, 2]], after["latents"][[0, 2]], rtol=0, atol=0)
    assert begun["state", "elapsed"].tolist() == [1, 0, 1]
    rolled = env.rollout(120, break_when_any_done=False)
    ends = rolled["next", "done"].sum(dim=(1, 2))
    assert (ends >= 2).all() and (rolled["state", "elapsed"].max() < 50)


def test_a_seed_decides_the_starts():
    env = TorchRLBridgeEnv(imagined(4))
    env.set_seed(3)
    first = env.reset()["latents"]
    other = env.reset()["latents"]
    env.set_seed(3)
    torch.testing.assert_close(env.reset()["latents"], first, rtol=0, atol=0)
    assert (first - other).abs().max() > 0
