"""The suite both twins pass, and what only the imagined one does."""

import importlib.util
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache

import av
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import envs  # noqa: F401  registers the ids
from envs.contexts import CONTEXTS_PATH, read_episode, recorded_context, shipped_context
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from tasks import TASKS
from tasks.task import REWARD_TERMS
from wfm_core.data.clip_cache import build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.models.scripted import ScriptedWorldModel
from worldsim.scripted_heads import ScriptedHeads
from worldsim.simulator import Calibration, WorldSim, load_world_sim

IMAGINED = {"id": "WorldModel-Bridge-v0", "world_model": "scripted"}
TWIN = {"id": "MujocoBridge-v0"}


@cache
def has_twin() -> bool:
    """Whether MuJoCo is here and can draw; asked in a process of its own, because a missing driver may abort."""
    if importlib.util.find_spec("mujoco") is None:
        return False
    code = "from envs.mujoco_gl import *; make_renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8).close()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.fixture(params=["scripted", "tiny_checkpoint", "tiny_transformer", "twin"], scope="module")
def kwargs(request) -> dict:
    if request.param == "twin":
        if not has_twin():
            pytest.skip("the twin needs mujoco and OpenGL")
        return TWIN
    if request.param == "scripted":
        return IMAGINED
    folder = request.getfixturevalue(request.param)
    return IMAGINED | {"world_model": load_world_sim(folder, dtype=torch.float32)}


def make_vec(kwargs: dict, num_envs: int, **more):
    return gym.make_vec(**{**kwargs, "num_envs": num_envs, **more})


def random_actions(seed: int, steps: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, rows, 7)).astype(np.float32)


def close(a: np.ndarray, b: np.ndarray) -> None:
    """Equal up to what the size of a batch does to float sums: one grey level, or 1e-3."""
    atol = 1 if a.dtype == np.uint8 else 1e-3
    np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), atol=atol)


def test_the_checker_finds_nothing(kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gym.make(**kwargs)
        check_env(env.unwrapped)
        env.close()
    assert [str(w.message) for w in caught if "WARN" in str(w.message)] == []


def test_a_batch_equals_its_rows(kwargs):
    batch = make_vec(kwargs, 3, autoreset_mode="Disabled")
    single = gym.make(**kwargs)
    options = {"initial_state": [0, 5, 5]}
    obs, _ = batch.reset(seed=[1, 2, 3], options=options)
    actions = random_actions(0, 4, 3)
    steps = [batch.step(action) for action in actions]
    for row, (seed, state) in enumerate(zip((1, 2, 3), options["initial_state"], strict=True)):
        row_obs, info = single.reset(seed=seed, options={"initial_state": state})
        assert info["initial_state"] == state
        for key in obs:
            np.testing.assert_array_equal(row_obs[key], obs[key][row])
        for action, (step_obs, reward, terminated, truncated, info) in zip(actions[:, row], steps, strict=True):
            row_obs, row_reward, row_terminated, row_truncated, row_info = single.step(action)
            for key in obs:
                close(row_obs[key], step_obs[key][row])
            assert row_reward == pytest.approx(reward[row], abs=1e-3)
            assert (row_terminated, row_truncated) == (terminated[row], truncated[row])
            assert row_info["uncertainty"] == pytest.approx(info["uncertainty"][row], abs=1e-3)
    batch.close()
    single.close()


def test_the_same_seed_gives_the_same_episode_and_another_seed_another_state(kwargs):
    env = make_vec(kwargs, 2)
    runs = []
    for _ in range(2):
        obs, info = env.reset(seed=11)
        steps = [env.step(action) for action in random_actions(1, 5, 2)]
        runs.append(
            (info["initial_state"], [obs["pixels"], *(step[0]["pixels"] for step in steps)], [s[1] for s in steps])
        )
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
    states = {tuple(env.reset(seed=seed)[1]["initial_state"]) for seed in range(6)}
    assert len(states) > 1
    env.close()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_reset_mask_leaves_the_other_rows_bit_identical(kwargs, mode):
    masked, plain = (make_vec(kwargs, 3, autoreset_mode=mode) for _ in range(2))
    actions = random_actions(2, 5, 3)
    for env in (masked, plain):
        env.reset(seed=4, options={"initial_state": 1})
        env.step(actions[0])
    mask = np.array([False, True, False])
    obs, _ = masked.reset(seed=[0, 9, 0], options={"reset_mask": mask, "initial_state": 2})
    fresh, _ = plain.reset(seed=[0, 9, 0], options={"reset_mask": ~mask, "initial_state": [2, 7, 2]})
    np.testing.assert_array_equal(obs["pixels"][1], fresh["pixels"][0])  # both show initial state 2
    plain.reset(seed=4, options={"initial_state": 1})
    plain.step(actions[0])
    for action in actions[1:]:
        a, b = masked.step(action), plain.step(action)
        for key in a[0]:
            np.testing.assert_array_equal(a[0][key][~mask], b[0][key][~mask])
        np.testing.assert_array_equal(a[1][~mask], b[1][~mask])
        np.testing.assert_array_equal(a[4]["uncertainty"][~mask], b[4]["uncertainty"][~mask])
    assert a[4]["elapsed_steps"].tolist() == [5, 4, 5]
    masked.close()
    plain.close()


def test_spaces_info_horizon_and_bad_actions(kwargs):
    env = make_vec(kwargs, 2, max_episode_steps=2, autoreset_mode="SameStep", task="reach_target")
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and set(obs) == {"pixels", "agent_pos"}
    assert env.unwrapped.task_description == TASKS["reach_target"].instruction
    idle = np.zeros((2, 7), np.float32)
    _, reward, _, truncated, info = env.step(idle * 9)
    assert not truncated.any() and reward.dtype == np.float64
    wanted = {"is_success", "uncertainty", "clipped", "end_reason", *(f"reward.{term}" for term in REWARD_TERMS)}
    assert wanted <= set(info)
    loud = idle.copy()
    loud[1, :3] = -2
    _, _, terminated, truncated, info = env.step(loud)
    assert truncated.all() and not terminated.any() and info["final_info"]["clipped"].tolist() == [0, 3]
    assert info["final_info"]["end_reason"].tolist() == ["horizon"] * 2
    with pytest.raises(ValueError, match="row 1"):
        env.step(np.where(loud < 0, np.inf, loud))
    with pytest.raises(ValueError, match=r"\(2, 7\), got \(7,\)"):
        env.step(idle[0])
    with pytest.raises(ValueError, match="did you mean 'put_carrot_on_plate'"):
        make_vec(kwargs, 2, task="put_carot_on_plate")
    assert len(env.render()) == 2 and env.render()[0].shape == env.single_observation_space["pixels"].shape
    env.close()


def test_importing_envs_by_id_needs_no_import_statement():
    code = "import gymnasium as g; print(g.make('envs:WorldModel-Bridge-v0', world_model='scripted').reset(seed=0)[1])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "initial_state" in run.stdout


def test_both_twins_begin_alike():
    if not has_twin():
        pytest.skip("the twin needs mujoco and OpenGL")
    for task in TASKS:
        twin, imagined = (make_vec(which, 3, task=task) for which in (TWIN, IMAGINED))
        options = {"initial_state": [0, 11, 23]}
        true, _ = twin.reset(seed=0, options=options)
        shown, _ = imagined.reset(seed=0, options=options)
        # Another OpenGL driver may shade a few pixels a little differently.
        difference = np.abs(true["pixels"].astype(int) - shown["pixels"])
        assert difference.mean() < 0.5, f"{task}: run `python -m envs.mujoco_contexts`"
        np.testing.assert_allclose(shown["agent_pos"], true["agent_pos"], atol=1e-4)
        twin.close()


def scripted_env(num_envs: int = 1, **kwargs) -> WorldModelBridgeVectorEnv:
    """An env whose point starts in the origin and has its goal at x = 0.2 m."""
    sim = WorldSim(ScriptedWorldModel(), ScriptedHeads(), calibration=Calibration(0.5, 0.5, 0.05))
    frames = np.full((3, 128, 128, 3), 127, np.uint8)
    frames[1] += 5  # 2 cm along each axis
    episode = Episode(frames, np.zeros((2, 7), np.float32), np.zeros((3, 7), np.float32), "", "flat", "commanded", 0)
    kwargs = {"initial_context": episode, "autoreset_mode": "Disabled", "task": "push_cube"} | kwargs
    return WorldModelBridgeVectorEnv(num_envs, sim, **kwargs)


def go(*dx: float) -> np.ndarray:
    return np.array([[x, 0, 0, 0, 0, 0, 1] for x in dx], np.float32)


def test_the_scripted_world_is_solved_by_going_there():
    env = scripted_env()
    obs, _ = env.reset(seed=0)
    assert (obs["pixels"] == 127).all()
    for k in range(1, 5):
        obs, _, terminated, _, info = env.step(go(1.0))
        assert obs["pixels"][0, 0, 0].tolist() == [round(127 + 0.05 * k / 0.004), 127, 127]
        assert obs["agent_pos"][0, 0] == pytest.approx(0.05 * k)
        assert info["success"][0] == (k == 4) and not terminated[0]
    for _ in range(2):
        _, reward, terminated, truncated, info = env.step(go(0.0))
        assert reward[0] == pytest.approx(0.1 + 1.0)
    assert terminated[0] and not truncated[0] and info["is_success"][0] and info["end_reason"][0] == "success"


@pytest.mark.parametrize(("probability", "ends"), [(0.59, [0, 0]), (0.61, [1, 0]), (0.71, [1, 1])])
def test_probabilities_become_events_at_their_own_thresholds(monkeypatch, probability, ends):
    read = ScriptedHeads.read
    sure = torch.tensor([probability])
    monkeypatch.setattr(ScriptedHeads, "read", lambda *args: replace(read(*args), success=sure, failure=sure))
    env = scripted_env()
    for thresholds in (Calibration(0.6, 0.7, np.inf), Calibration(0.1, 0.7, np.inf, {env.task_description: 0.6})):
        env.sim.calibration = thresholds
        env.reset(seed=0)
        *_, info = env.step(go(0.0))
        assert [info["success"][0], info["failure"][0]] == ends


@pytest.mark.parametrize("limit", [float("nan"), -0.1])
def test_a_limit_that_cannot_be_is_refused(limit):
    with pytest.raises(ValueError, match="uncertainty_limit must be at least 0"):
        scripted_env(uncertainty_limit=limit)


@pytest.mark.parametrize(
    ("limit", "steps", "reason"), [(None, 10, "uncertainty"), (0.01, 9, "uncertainty"), (np.inf, 11, "failure")]
)
def test_leaving_what_the_model_knows_truncates_and_the_limit_can_be_lifted(limit, steps, reason):
    env = scripted_env(uncertainty_limit=limit)  # trusts 0.4 m, calibrated limit 0.05 m beyond, fails at 0.5 m
    env.reset(seed=0)
    for step in range(1, steps + 1):  # 0.048 m each
        *_, terminated, truncated, info = env.step(go(-0.96))
        assert (terminated[0] or truncated[0]) == (step == steps)
    assert (truncated[0], terminated[0]) == ((reason == "uncertainty"), (reason == "failure"))
    assert info["end_reason"][0] == reason
    assert info["uncertainty"][0] == pytest.approx(0.048 * steps - 0.4, abs=1e-5)


def test_a_longer_context_is_seen_to_its_end():
    env = scripted_env(context_frames=2)
    obs, _ = env.reset(seed=0)
    assert (obs["pixels"] == 132).all()
    obs, *_ = env.step(go(0.0))
    assert (obs["pixels"] == 132).all()
    with pytest.raises(ValueError, match=r"1 \.\. 3 for episode 'flat', got 4"):
        scripted_env(context_frames=4)
    with pytest.raises(ValueError, match="context_frames must be 1 without"):
        WorldModelBridgeVectorEnv(1, "scripted", context_frames=2)


def test_latent_observations_decode_nothing_until_somebody_looks(monkeypatch):
    env = scripted_env(2, observation="latents")
    decoded = []
    decode = env.sim.world_model.decode
    monkeypatch.setattr(env.sim.world_model, "decode", lambda *args: decoded.append(len(args[0])) or decode(*args))
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and obs["latents"].shape == (2, 1, 1, 3)
    obs, *_ = env.step(go(1.0, -1.0))
    np.testing.assert_allclose(obs["latents"][:, 0, 0, 0], [0.05, -0.05], atol=1e-6)
    assert decoded == []
    assert env.render()[0][0, 0, 0] == 140 and env.render()[1][0, 0, 0] == 114 and decoded == [2]
    env.step(go(0.0, 0.0))
    env.reset(options={"reset_mask": np.array([True, False])})
    assert (env.render()[0] == 127).all() and decoded == [2, 1]  # a context frame needs no decoding


def test_a_state_can_be_branched_without_disturbing_the_env():
    env, untouched = scripted_env(), scripted_env()
    for each in (env, untouched):
        each.reset(seed=0)
        each.step(go(1.0))
    env.sim.step(env.state.repeat(4), torch.full((4, 7), 0.05))
    np.testing.assert_array_equal(env.step(go(1.0))[0]["pixels"], untouched.step(go(1.0))[0]["pixels"])
    with pytest.raises(ValueError, match="reset before"):
        _ = scripted_env().state


@pytest.mark.parametrize("with_pose", [True, False])
def test_it_starts_from_a_real_clip_of_another_size(tiny_checkpoint, with_pose):
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (6, 48, 64, 3)).astype(np.uint8)
    actions = random.uniform(-0.05, 0.05, (5, 7)).astype(np.float32)
    pose = random.uniform(-0.2, 0.2, (6, 7)).astype(np.float32) if with_pose else None
    clip = Episode(frames, actions, pose, "open the drawer", "real", "commanded", 1)
    env = WorldModelBridgeVectorEnv(
        2, tiny_checkpoint, initial_context=clip, context_frames=3, uncertainty_limit=np.inf
    )
    obs, info = env.reset(seed=0)
    assert (
        obs in env.observation_space
        and obs["pixels"].shape == (2, 32, 32, 3)
        and info["initial_state"].tolist() == [0, 0]
    )
    assert not with_pose or np.allclose(obs["agent_pos"][0, :6], pose[2, :6])
    for action in random_actions(3, 5, 2):
        obs, reward, *_, info = env.step(action)
        assert obs in env.observation_space and np.isfinite(reward).all() and (info["uncertainty"] > 0).all()


@pytest.mark.parametrize("family", ["tiny_transformer", "tiny_diffusion"])
def test_every_family_is_made_by_the_name_of_its_folder(family, request):
    env = gym.make("WorldModel-Bridge-v0", world_model=str(request.getfixturevalue(family)))
    first, _ = env.reset(seed=0)
    after, _, _, _, info = env.step(np.zeros(7, np.float32))
    assert env.observation_space.contains(after) and (after["pixels"] != first["pixels"]).any()
    assert 0 <= info["uncertainty"] <= 1


def test_an_episode_on_disk_is_named_by_folder_and_number(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("libx264rgb", rate=20)
        stream.width = stream.height = 16
        stream.pix_fmt, stream.options = "rgb24", {"qp": "0"}
        for grey in (10, 20, 30):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), grey, np.uint8), format="rgb24")))
        video.mux(stream.encode(None))
    np.savez(tmp_path / "clip.npz", np.zeros((3, 10), np.float32))
    assert read_episode(tmp_path).frames[:, 0, 0, 0].tolist() == [10, 20, 30]
    env = WorldModelBridgeVectorEnv(1, "scripted", initial_context=f"{tmp_path}#0", context_frames=2)
    assert (env.reset(seed=0)[0]["pixels"] == 20).all()
    with pytest.raises(ValueError, match=r"episodes 0 \.\. 0, got 1"):
        read_episode(f"{tmp_path}#1")
    (tmp_path / "clip.npz").unlink()  # a video alone will do for one frame
    env = WorldModelBridgeVectorEnv(1, "scripted", initial_context=tmp_path)
    assert (env.reset(seed=0)[0]["pixels"] == 10).all()
    with pytest.raises(ValueError, match=r"must be 1 for episode 'clip\.mp4', whose actions are unknown, got 2"):
        WorldModelBridgeVectorEnv(1, "scripted", initial_context=tmp_path, context_frames=2)
    with pytest.raises(ValueError, match="no such folder"):
        read_episode(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="<episode number>"):
        read_episode(f"{tmp_path}#first")


def test_the_shipped_context_cover_every_initial_state():
    for task in TASKS.values():
        context, count = shipped_context(task), len(task.initial_states)
        assert context.frames.shape == (count, 1, 128, 128, 3) and context.frames.dtype == np.uint8
        assert len({frame.tobytes() for frame in context.frames}) == count
        assert context.agent_pos.shape == (count, 1, 7) and context.actions.shape == (count, 0, 7)
    assert CONTEXTS_PATH.stat().st_size < 4 * 2**20


def test_sixty_four_rows_by_id():
    env = gym.make_vec("WorldModel-Bridge-v0", num_envs=64, world_model="scripted")
    obs, _ = env.reset(seed=0)
    assert obs["pixels"].shape == (64, 128, 128, 3) and env.step(env.action_space.sample())[1].shape == (64,)


def test_what_cannot_be_is_named(tiny_checkpoint):
    with pytest.raises(ValueError, match="observation must be one of"):
        WorldModelBridgeVectorEnv(1, "scripted", observation="tokens")
    with pytest.raises(ValueError, match="no checkpoint 'bridge-nan'"):
        gym.make("WorldModel-Bridge-v0", world_model="bridge-nan")
    sim = load_world_sim(tiny_checkpoint)
    sim.heads.config = type(sim.heads.config)(("wipe the table",), (2, 2, 3))
    with pytest.raises(ValueError, match="put the carrot on the plate"):
        WorldModelBridgeVectorEnv(1, sim)


def test_rows_may_begin_anywhere_in_recordings_before_they_are_solved(tmp_path):
    task, frame = TASKS["push_cube"], (128, 128, 3)

    def episode(number: int, instruction: str, solved: int) -> Episode:
        frames = np.zeros((9, *frame), np.uint8) + (np.arange(9, dtype=np.uint8) + 20 * number)[:, None, None, None]
        agent_pos = np.zeros((9, 7), np.float32) + np.arange(9, dtype=np.float32)[:, None] / 100
        actions = np.zeros((8, 7), np.float32)
        success = np.arange(9) >= solved
        return Episode(frames, actions, agent_pos, instruction, str(number), "commanded", 0, {"success": success})

    episodes = [episode(0, task.instruction, 5), episode(1, "something else", 5), episode(2, task.instruction, 99)]
    solved_at_once = episode(3, task.instruction, 0)
    caches = [
        build_clip_cache(iter(episodes[:2]), tmp_path / "a"),
        build_clip_cache(iter([*episodes[2:], solved_at_once]), tmp_path / "b"),
    ]
    context = recorded_context(caches, task, 300, seed=0)
    seen = set(context.frames[:, 0, 0, 0, 0].tolist())
    assert seen == {*range(5), *range(40, 48)}
    firsts = recorded_context(caches, task, 300, seed=0, first=True)
    assert set(firsts.frames[:, 0, 0, 0, 0].tolist()) == {0, 40}
    np.testing.assert_allclose(context.agent_pos[:, 0, 0], context.frames[:, 0, 0, 0, 0] % 20 / 100, atol=1e-6)
    env = WorldModelBridgeVectorEnv(3, "scripted", "push_cube", initial_context=context, observation="latents")
    obs, info = env.reset(seed=0)
    assert env.num_initial_states == 300
    np.testing.assert_allclose(obs["agent_pos"], context.agent_pos[info["initial_state"], 0])
    with pytest.raises(ValueError, match="need recorded episodes of 'stack"):
        recorded_context(caches, TASKS["stack_cubes"], 3, seed=0)
