import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("mujoco")

import envs  # noqa: F401  registers the ids
from envs.mujoco_bridge import MujocoBridgeVectorEnv
from tasks import TASKS


@pytest.mark.filterwarnings("error")
def test_gymnasiums_checker_passes():
    env = gym.make("MujocoBridge-v0", task="stack_cubes", jitter=0.005, factors=("light",), render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_spec_is_serialisable():
    assert "MujocoBridge-v0" in gym.make("MujocoBridge-v0", task="reach_target", factors=["table"]).spec.to_json()


def test_a_batch_equals_its_rows():
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (6, 2, 7)).astype(np.float32)
    vector = gym.make_vec("MujocoBridge-v0", num_envs=2, task="push_cube", jitter=0.01, factors=["camera"])
    batch, _ = vector.reset(seed=[5, 6], options={"initial_state": [1, 20]})
    for row, (seed, state) in enumerate([(5, 1), (6, 20)]):
        single = gym.make("MujocoBridge-v0", task="push_cube", jitter=0.01, factors=["camera"])
        obs, info = single.reset(seed=seed, options={"initial_state": state})
        assert info["initial_state"] == state
        np.testing.assert_array_equal(obs["pixels"], batch["pixels"][row])
        single.close()
    singles = [gym.make("MujocoBridge-v0", task="push_cube", jitter=0.01, factors=["camera"]) for _ in range(2)]
    for row, single in enumerate(singles):
        single.reset(seed=5 + row, options={"initial_state": [1, 20][row]})
    for action in actions:
        batch, rewards, *_ = vector.step(action)
        for row, single in enumerate(singles):
            obs, reward, *_ = single.step(action[row])
            np.testing.assert_array_equal(obs["pixels"], batch["pixels"][row])
            np.testing.assert_array_equal(obs["agent_pos"], batch["agent_pos"][row])
            assert reward == pytest.approx(rewards[row])
    for env in (vector, *singles):
        env.close()


def test_reset_mask_leaves_other_rows_alone():
    env = MujocoBridgeVectorEnv(2, "put_carrot_on_plate", autoreset_mode="Disabled")
    env.reset(seed=0, options={"initial_state": [0, 1]})
    before, *_ = env.step(np.full((2, 7), 0.3, np.float32))
    after, _ = env.reset(seed=1, options={"reset_mask": np.array([False, True]), "initial_state": 7})
    np.testing.assert_array_equal(before["pixels"][0], after["pixels"][0])
    assert np.abs(before["pixels"][1].astype(int) - after["pixels"][1]).mean() > 1
    env.close()


def test_jitter_moves_the_objects_by_the_seed_and_zero_jitter_does_not():
    def place(seed, jitter):
        env = MujocoBridgeVectorEnv(1, "stack_cubes", jitter=jitter)
        env.reset(seed=seed, options={"initial_state": 0})
        position = env.twins[0].task_state().positions["green_cube"]
        env.close()
        return position

    published = TASKS["stack_cubes"].initial_states[0]["green_cube"]
    np.testing.assert_allclose(place(1, 0.0)[:2], (published.x, published.y), atol=1e-4)
    np.testing.assert_array_equal(place(1, 0.01), place(1, 0.01))
    assert 1e-3 < np.abs(place(1, 0.01) - place(2, 0.01)).max() < 0.05


def test_success_held_ends_the_episode_with_full_reward():
    env = MujocoBridgeVectorEnv(1, "reach_target", autoreset_mode="Disabled")
    env.reset(seed=0, options={"initial_state": 0})
    target = TASKS["reach_target"].initial_states[0]["marker"]
    for _ in range(TASKS["reach_target"].max_episode_steps):
        pose = env.twins[0].agent_pos()
        delta = np.clip(np.array([target.x, target.y, target.z]) - pose[:3], -0.05, 0.05) / 0.05
        _, reward, terminated, truncated, info = env.step(np.array([[*delta, 0, 0, 0, 1]]))
        assert not truncated[0]
        if terminated[0]:
            break
    assert terminated[0] and info["is_success"][0] and info["end_reason"][0] == "success"
    assert info["reward.success"][0] == 1.0
    assert reward[0] > 1.0
    env.close()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"task": "put_carot_on_plate"}, "did you mean 'put_carrot_on_plate'"),
        ({"jitter": -1.0}, "jitter must be .* got -1.0"),
        ({"factors": ["lamp"]}, "got 'lamp'"),
    ],
)
def test_bad_arguments_are_named(bad, named):
    with pytest.raises(ValueError, match=named):
        gym.make("MujocoBridge-v0", **bad)


HIDE_GL = """
import ctypes, ctypes.util
load, find = ctypes.CDLL.__init__, ctypes.util.find_library
def load_but_gl(self, name, *args, **kwargs):
    if "GL" in str(name):
        raise OSError(f"{name}: cannot open shared object file")
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = load_but_gl
ctypes.util.find_library = lambda name: None if "GL" in name else find(name)
"""
HIDE_MUJOCO = "import sys; sys.modules['mujoco'] = None\n"
USE = """
try:
    import gymnasium as gym, envs
    gym.make("MujocoBridge-v0").unwrapped.reset(seed=0)
except (RuntimeError, ImportError) as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("prepare", "platform", "advice"),
    [
        (HIDE_GL, "egl", "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"),  # no library: fails at import
        ("", "glfw", "set MUJOCO_GL=egl"),  # no display: fails at the first frame
        (HIDE_MUJOCO, "egl", "pip install 'worldsim[twin]'"),
    ],
)
def test_missing_gl_or_mujoco_says_in_one_line_what_to_install(prepare, platform, advice):
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-c", prepare + USE],
        capture_output=True,
        text=True,
        env=environment | {"MUJOCO_GL": platform},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert advice in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
