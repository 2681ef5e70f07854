import gymnasium as gym
import numpy as np
import pytest

stable_baselines3 = pytest.importorskip("stable_baselines3")

from policies import load_policy  # noqa: E402
from policies.sb3_policy import SB3Policy, load_sb3  # noqa: E402

PIXELS = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
AGENT_POS = gym.spaces.Box(-1, 1, (7,), np.float32)
SPACES = {"dict": gym.spaces.Dict({"pixels": PIXELS, "agent_pos": AGENT_POS}), "pixels": PIXELS, "agent_pos": AGENT_POS}
POLICIES = {"dict": "MultiInputPolicy", "pixels": "CnnPolicy", "agent_pos": "MlpPolicy"}


class Env(gym.Env):
    action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def make(algorithm, kind):
    settings = {} if algorithm in ("PPO", "A2C") else {"buffer_size": 10}
    return getattr(stable_baselines3, algorithm)(POLICIES[kind], Env(SPACES[kind]), seed=0, device="cpu", **settings)


def obs(num_rows):
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (num_rows, 36, 36, 3), dtype=np.uint8),
        "agent_pos": rng.uniform(-1, 1, (num_rows, 7)).astype(np.float32),
    }


@pytest.mark.parametrize("kind", SPACES)
def test_acts_as_the_model_predicts(kind):
    model = make("PPO", kind)
    policy = SB3Policy(model)
    policy.reset(3, instruction="go", seeds=[0, 1, 2])
    batch = obs(3)
    actions = policy.act(batch | {"more": np.zeros(3)})
    expected = model.predict(batch if kind == "dict" else batch[kind], deterministic=True)[0]
    np.testing.assert_array_equal(actions, expected)
    assert actions.shape == (3, 7)
    assert actions.dtype == np.float32
    assert np.abs(actions[0] - actions[1]).max() > 0
    one = policy.act({key: value[:1] for key, value in batch.items()})
    np.testing.assert_allclose(one, actions[:1], atol=1e-6)


@pytest.mark.parametrize("algorithm", ["A2C", "PPO", "SAC", "TD3"])
def test_finds_the_algorithm_of_a_file(algorithm, tmp_path):
    model = make(algorithm, "agent_pos")
    model.save(tmp_path / "model.zip")
    policy = load_policy(tmp_path / "model.zip")
    assert isinstance(policy, SB3Policy)
    assert type(policy.model).__name__ == algorithm
    expected = model.predict(obs(2)["agent_pos"], deterministic=True)[0]
    np.testing.assert_array_equal(policy.act(obs(2)), expected)


def test_loads_from_a_checkpoint_folder(tmp_path):
    make("DDPG", "agent_pos").save(tmp_path / "model.zip")
    (tmp_path / "config.json").write_text('{"kind": "sb3", "algorithm": "DDPG"}')
    policy = load_policy(tmp_path)
    assert isinstance(policy, SB3Policy)
    assert type(policy.model).__name__ == "DDPG"


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "model.zip"
    make("PPO", "agent_pos").save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="model.zip"):
        load_sb3(path)
    with pytest.raises(ValueError, match="absent.zip"):
        load_sb3(tmp_path / "absent.zip")


def test_an_unknown_algorithm_is_named(tmp_path):
    make("PPO", "agent_pos").save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="got 'DQN'"):
        load_sb3(tmp_path / "model.zip", "DQN")
