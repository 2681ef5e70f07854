from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs.judging import StepResult
from envs.spaces import pixels_observation_space
from envs.vector import BridgeEnv, BridgeVectorEnv, find_task
from tasks.task import REWARD_WEIGHTS, SUCCESS_HOLD_STEPS, Pose, Task
from wfm_core.data.actions import MAX_TRANSLATION, to_physical

LINE = Task(
    name="line",
    instruction="go right",
    scene="table",
    objects=(),
    source=None,
    target="end",
    initial_states=tuple({"start": Pose(float(x), 0.0, 0.0)} for x in (0, 1, 2)),
    max_episode_steps=12,
    success=lambda state: False,
    failure=lambda state: False,
    reward_terms=lambda state: {},
)


class LineVectorEnv(BridgeVectorEnv):
    """x' = x + dx / 0.05 + noise of the row's seed; success from 4 on, failure below -4; |dy| is the uncertainty."""

    def __init__(self, num_envs: int, noise: float = 0.3, **kwargs) -> None:
        super().__init__(num_envs, LINE, pixels_observation_space((2, 2, 3)), **kwargs)
        self.x = np.zeros(num_envs)
        self.noise = noise
        self.noises: list = [None] * num_envs

    def _start_rows(self, mask, seeds, initial_states):
        for row in np.flatnonzero(mask):
            self.x[row] = LINE.initial_states[initial_states[row]]["start"].x
            self.noises[row] = np.random.default_rng(seeds[row])

    def _advance(self, actions, active):
        for row in np.flatnonzero(active):
            self.x[row] += actions[row, 0] / MAX_TRANSLATION + self.noise * self.noises[row].normal()
        success = self.x >= 4
        terms = np.stack([np.clip(self.x / 4, 0, 1), np.zeros_like(self.x), np.full_like(self.x, 0.5), success], axis=1)
        return StepResult(terms, success, self.x < -4, np.abs(actions[:, 1]).astype(np.float64) / MAX_TRANSLATION)

    def _observe(self):
        pixels = np.broadcast_to(
            (self.x * 10 + 100).clip(0, 255).astype(np.uint8)[:, None, None, None], (len(self.x), 2, 2, 3)
        )
        agent_pos = np.zeros((len(self.x), 7), np.float32)
        agent_pos[:, 0] = self.x / 10
        return {"pixels": pixels, "agent_pos": agent_pos}


class LineEnv(BridgeEnv):
    def __init__(self, render_mode=None, **kwargs) -> None:
        super().__init__(LineVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, render_mode=render_mode, **kwargs))


def moves(*dx: float) -> np.ndarray:
    actions = np.zeros((len(dx), 7), np.float32)
    actions[:, 0] = dx
    return actions


def assert_same_info(ours: dict, reference: dict) -> None:
    keys = {key for info in (ours, reference) for key in info if not key.startswith("_")}
    for key in keys:
        mask = ours.get(f"_{key}", np.zeros(1, bool))
        if not mask.any():
            assert not reference.get(f"_{key}", np.zeros(1, bool)).any(), key
            continue
        np.testing.assert_array_equal(mask, reference[f"_{key}"], err_msg=key)
        if key == "final_info":
            assert_same_info(ours[key], reference[key])
            continue
        for row in np.flatnonzero(mask):
            if isinstance(ours[key][row], dict):
                for name in ours[key][row]:
                    np.testing.assert_array_equal(ours[key][row][name], reference[key][row][name])
            else:
                assert ours[key][row] == reference[key][row], key


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_autoreset_mode_does_what_gymnasiums_own_vector_env_does(mode):
    ours = LineVectorEnv(4, autoreset_mode=mode, uncertainty_limit=0.97)
    reference = SyncVectorEnv([lambda: LineEnv(uncertainty_limit=0.97)] * 4, autoreset_mode=mode)
    random = np.random.default_rng(0)
    results = [env.reset(seed=7) for env in (ours, reference)]
    ends = set()
    for _ in range(120):
        (obs, info), (ref_obs, ref_info) = results
        np.testing.assert_array_equal(obs["pixels"], ref_obs["pixels"])
        np.testing.assert_array_equal(obs["agent_pos"], ref_obs["agent_pos"])
        assert_same_info(info, ref_info)
        action = random.uniform(-1.0, 1.0, (4, 7)).astype(np.float32)
        action[:, 0] = random.choice([-1.2, 1.2], 4) * np.array([1, 1, 0.2, 1])
        steps = [env.step(action) for env in (ours, reference)]
        for ours_part, reference_part in zip(steps[0][1:4], steps[1][1:4], strict=True):
            np.testing.assert_array_equal(ours_part, reference_part)
            assert ours_part.dtype == reference_part.dtype
        assert_same_info(steps[0][4], steps[1][4])
        final = steps[0][4].get("final_info", steps[0][4])
        ends |= set(final["end_reason"][final["_end_reason"]])
        results = [(step[0], step[4]) for step in steps]
        ended = steps[0][2] | steps[0][3]
        if mode is AutoresetMode.DISABLED and ended.any():
            results = [env.reset(options={"reset_mask": ended.copy()}) for env in (ours, reference)]
    assert ends - {""} == {"success", "failure", "uncertainty", "horizon"}


def test_success_must_hold_before_the_row_terminates():
    env = LineVectorEnv(1, noise=0.0, autoreset_mode="Disabled")
    env.reset(options={"initial_state": 2})
    for dx, success in ((1, False), (1, True), (-1, False), (1, True), (1, True)):  # leaving starts the count again
        _, reward, terminated, _, info = env.step(moves(dx))
        assert info["success"][0] == success and not terminated[0] and not info["is_success"][0]
        assert (reward[0] >= REWARD_WEIGHTS["success"]) == success
    assert reward[0] == pytest.approx(REWARD_WEIGHTS["reach"] + 0.5 * REWARD_WEIGHTS["transport"] + 1.0)
    _, _, terminated, truncated, info = env.step(moves(1))
    assert SUCCESS_HOLD_STEPS == 3 and terminated[0] and not truncated[0]
    assert info["is_success"][0] and info["end_reason"][0] == "success"


def test_a_new_episode_starts_the_count_again():
    env = LineVectorEnv(1, noise=0.0, autoreset_mode="Disabled")
    env.reset()
    for _ in range(2):
        env.x[:] = 10
        env.step(moves(0))
    env.reset()
    env.x[:] = 10
    assert not env.step(moves(0))[2][0]


def test_the_horizon_truncates_and_success_at_the_last_step_terminates_instead():
    env = LineVectorEnv(2, noise=0.0, autoreset_mode="Disabled", max_episode_steps=4)
    env.reset(options={"initial_state": [0, 2]})
    for _ in range(3):
        _, _, terminated, truncated, _ = env.step(moves(0, 1))
        assert not (terminated | truncated).any()
    _, _, terminated, truncated, info = env.step(moves(0, 1))
    assert terminated.tolist() == [False, True] and truncated.tolist() == [True, False]
    assert info["end_reason"].tolist() == ["horizon", "success"] and info["elapsed_steps"].tolist() == [4, 4]


def test_uncertainty_above_the_limit_or_nan_truncates():
    env = LineVectorEnv(3, noise=0.0, autoreset_mode="Disabled", uncertainty_limit=0.5)
    env.reset(options={"initial_state": 0})
    action = moves(0, 0, 0)
    action[:, 1] = [0.4, 0.6, 0.0]
    advance = env._advance

    def with_nan(actions, active):
        result = advance(actions, active)
        result.uncertainty[2] = np.nan
        return result

    env._advance = with_nan
    _, _, terminated, truncated, info = env.step(action)
    assert truncated.tolist() == [False, True, True] and not terminated.any()
    assert info["end_reason"].tolist() == ["", "uncertainty", "uncertainty"]


def test_a_batch_equals_its_rows_and_the_same_seed_gives_the_same_episode():
    batch = LineVectorEnv(3, autoreset_mode="SameStep")
    rows = [LineVectorEnv(1, autoreset_mode="SameStep") for _ in range(3)]
    batch.reset(seed=[5, 9, 5])
    for row, seed in zip(rows, (5, 9, 5), strict=True):
        row.reset(seed=seed)
    for _ in range(30):
        obs, reward, *_ = batch.step(moves(0.8, 0.8, 0.8))
        for i, row in enumerate(rows):
            row_obs, row_reward, *_ = row.step(moves(0.8))
            assert row_reward[0] == reward[i]
            np.testing.assert_array_equal(row_obs["agent_pos"][0], obs["agent_pos"][i])
        assert reward[0] == reward[2]
    assert batch.x[0] != batch.x[1]


def test_choosing_the_initial_state_changes_nothing_else():
    env = LineVectorEnv(1)
    _, drawn = env.reset(seed=3)
    trace = [env.step(moves(0.5))[0]["agent_pos"] for _ in range(3)]
    _, chosen = env.reset(seed=3, options={"initial_state": int(drawn["initial_state"][0])})
    assert chosen["episode_seed"] == drawn["episode_seed"]
    np.testing.assert_array_equal(trace, [env.step(moves(0.5))[0]["agent_pos"] for _ in range(3)])
    _, other = env.reset(seed=3, options={"initial_state": (int(drawn["initial_state"][0]) + 1) % 3})
    assert other["episode_seed"] == drawn["episode_seed"] and other["initial_state"] != drawn["initial_state"]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_reset_mask_leaves_the_other_rows_bit_identical(mode):
    masked, plain = LineVectorEnv(3, autoreset_mode=mode), LineVectorEnv(3, autoreset_mode=mode)
    for env in (masked, plain):
        env.reset(seed=1, options={"initial_state": 0})
        env.step(moves(0.1, 0.1, 0.1))
    mask = np.array([False, True, False])
    obs, info = masked.reset(seed=[99, 4, 99], options={"reset_mask": mask, "initial_state": [1, 2, 1]})
    assert obs["agent_pos"][1, 0] == np.float32(0.2) and info["_initial_state"].tolist() == mask.tolist()
    for _ in range(4):
        a, b = (env.step(moves(0.1, 0.1, 0.1)) for env in (masked, plain))
        np.testing.assert_array_equal(a[0]["agent_pos"][~mask], b[0]["agent_pos"][~mask])
        np.testing.assert_array_equal(a[1][~mask], b[1][~mask])
    assert (a[4]["elapsed_steps"] == [5, 4, 5]).all() and (a[4]["initial_state"] == [0, 2, 0]).all()


def test_actions_are_clipped_and_counted_and_bad_ones_refused():
    env = LineVectorEnv(2, noise=0.0)
    env.reset(options={"initial_state": 0})
    action = moves(3.0, 1.0)
    action[0, 4] = -1.5
    obs, *_, info = env.step(action)
    assert info["clipped"].tolist() == [2, 0]
    np.testing.assert_array_equal(obs["agent_pos"][0], obs["agent_pos"][1])
    action[1, 3] = np.nan
    with pytest.raises(ValueError, match="actions must be finite, got .* in row 1"):
        env.step(action)
    with pytest.raises(ValueError, match=r"shape \(2, 7\), got \(2, 6\)"):
        env.step(action[:, :6])


def test_next_step_ignores_the_action_of_a_row_that_restarts():
    env = LineVectorEnv(2, noise=0.0, autoreset_mode="NextStep", max_episode_steps=1)
    env.reset(options={"initial_state": 0})
    env.step(moves(0, 0))
    seen = []
    env._advance = lambda actions, active: seen.append(actions) or LineVectorEnv._advance(env, actions, active)
    _, reward, terminated, truncated, info = env.step(np.full((2, 7), np.nan))
    np.testing.assert_array_equal(seen[0], to_physical(np.zeros((2, 7))))
    assert not reward.any() and not (terminated | truncated).any() and "_is_success" in info
    assert not info["_is_success"].any() and info["_initial_state"].all()


def test_misuse_is_named():
    env = LineVectorEnv(2, autoreset_mode="Disabled", max_episode_steps=1)
    with pytest.raises(ResetNeeded):
        env.step(moves(0, 0))
    with pytest.raises(ResetNeeded, match=r"\[1\]"):
        env.reset(options={"reset_mask": np.array([True, False])})
    env.reset()
    env.step(moves(0, 0))
    with pytest.raises(ResetNeeded, match=r"rows \[0, 1\]"):
        env.step(moves(0, 0))
    with pytest.raises(TypeError, match="dtype bool"):
        env.reset(options={"reset_mask": [True, False]})
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        env.reset(options={"reset_mask": np.zeros(2, bool)})
    with pytest.raises(ValueError, match=r"0 \.\. 2, got 3"):
        env.reset(options={"initial_state": [0, 3]})
    with pytest.raises(ValueError, match="2 ints"):
        env.reset(options={"initial_state": [0, 1, 2]})
    with pytest.raises(ValueError, match="got 3"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="num_envs"):
        LineVectorEnv(0)
    with pytest.raises(ValueError, match="did you mean 'line'"):
        find_task("lime", {"line": LINE, "other": LINE})


def test_observations_are_fresh_and_inside_the_space():
    env = LineVectorEnv(2, noise=0.0)
    obs, _ = env.reset(options={"initial_state": 0})
    env.x[:] = 20  # agent_pos would be 2 m
    later = env.step(moves(0, 0))[0]
    assert later in env.observation_space and later["agent_pos"][0, 0] == 1.0
    assert not any(np.shares_memory(obs[key], later[key]) for key in obs)
    assert obs["agent_pos"][0, 0] == 0.0


def test_it_answers_what_lerobot_eval_asks():
    env = LineVectorEnv(2, autoreset_mode="SameStep", noise=0.0, max_episode_steps=3)
    obs, _ = env.reset(seed=[1, 2], options={"lerobot_new_rollout": True})
    assert env.call("_max_episode_steps") == (3, 3) and env.get_attr("task_description") == ("go right",) * 2
    frames = env.call("render")
    assert len(frames) == 2 and frames[1].shape == (2, 2, 3) and env.unwrapped.metadata["render_fps"] == 5
    env.reset(options={"initial_state": [2, 0]})
    for _ in range(2):
        *_, info = env.step(moves(1, 0))
        assert "final_info" not in info
    *_, info = env.step(moves(1, 0))
    assert info["final_info"]["is_success"].tolist() == [False, False]
    env.reset(options={"initial_state": [2, 0]})
    env.rules = replace(env.rules, max_episode_steps=5)
    for _ in range(4):
        *_, info = env.step(moves(1, 0))
    assert info["final_info"]["is_success"].tolist() == [True, False] and info["_final_info"].tolist() == [True, False]
    assert info["final_obs"][0]["agent_pos"][0] == pytest.approx(0.6) and info["final_obs"][1] is None


def test_the_single_env_passes_gymnasiums_checker_without_a_warning(recwarn):
    gym.register("Line-v0", entry_point=LineEnv)
    check_env(gym.make("Line-v0").unwrapped)
    assert [str(w.message) for w in recwarn if "gym" in w.filename or "gym" in str(w.category)] == []
    env = gym.make("Line-v0", render_mode="rgb_array")
    obs, info = env.reset(seed=0, options={"initial_state": 1})
    assert obs["agent_pos"].shape == (7,) and info["initial_state"] == 1
    obs, reward, terminated, truncated, info = env.step(np.zeros(7, np.float32))
    assert type(reward) is float and type(terminated) is bool and type(info["is_success"]) is bool
    assert env.render().shape == (2, 2, 3) and env.unwrapped.task_description == "go right"
    with pytest.raises(ValueError, match=r"\(7,\), got \(1, 7\)"):
        env.unwrapped.step(np.zeros((1, 7), np.float32))


def test_physical_units_reach_the_dynamics():
    env = LineVectorEnv(1, noise=0.0)
    seen = []
    env._advance = lambda actions, active: seen.append(actions) or LineVectorEnv._advance(env, actions, active)
    env.reset()
    action = np.full((1, 7), 0.5)
    env.step(action)
    np.testing.assert_array_equal(seen[0], to_physical(action))
