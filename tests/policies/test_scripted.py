"""Experts in the twin solve every task; failures fail; the noise dial works; seeds decide."""

import numpy as np
import pytest

from policies.behaviours import BEHAVIOURS
from policies.scripted import ScriptedExpert
from tasks import SUCCESS_HOLD_STEPS, TASKS, jitter_initial_state
from wfm_core.data.actions import ACTION_HIGH, ACTION_LOW

pytest.importorskip("mujoco")


@pytest.fixture(scope="module")
def stages():
    """Compile each task's scene once; nothing here renders."""
    from envs.mujoco_bridge import Stage

    made = {}

    def stage(task):
        if task.name not in made:
            made[task.name] = Stage(task)
        return made[task.name]

    return stage


def play_episode(stages, name: str, index: int, behaviour: str = "expert", noise: float = 0.0, max_steps: int = 120):
    """Run one episode; return (solved, actions, what was grasped at each step)."""
    from envs.mujoco_bridge import MujocoBridge

    task = TASKS[name]
    twin, rng = MujocoBridge(task, stage=stages(task)), np.random.default_rng(index)
    twin.reset(jitter_initial_state(task.initial_states[index], rng, 0.01), rng)
    expert = ScriptedExpert(task, behaviour, noise, seed=index)
    held, actions, grasped = 0, [], []
    for _ in range(min(task.max_episode_steps, max_steps)):
        state = twin.task_state()
        actions.append(expert.act(state, twin.agent_pos()))
        grasped.append(state.grasped)
        twin.step(actions[-1])
        held = held + 1 if task.success(twin.task_state()) else 0
        if held >= SUCCESS_HOLD_STEPS or task.failure(twin.task_state()):
            break
    return held >= SUCCESS_HOLD_STEPS, np.array(actions), grasped


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("index", [0, 22])
def test_the_expert_solves_every_task(stages, name: str, index: int) -> None:
    solved, actions, grasped = play_episode(stages, name, index)
    assert solved
    assert actions.dtype == np.float32
    assert actions.shape[1:] == (7,)
    assert np.all((actions >= ACTION_LOW) & (actions <= ACTION_HIGH))
    if name not in ("reach_target", "push_cube"):
        assert TASKS[name].source in grasped


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("behaviour", ["miss_grasp", "drop_early", "wrong_object", "idle"])
def test_deliberate_failures_fail(stages, name: str, behaviour: str) -> None:
    solved, actions, grasped = play_episode(stages, name, 11, behaviour, max_steps=40)
    assert not solved
    assert np.all((actions >= ACTION_LOW) & (actions <= ACTION_HIGH))
    if name in ("put_spoon_on_towel", "put_carrot_on_plate", "stack_cubes", "put_eggplant_in_basket"):
        assert any(grasped) is (behaviour in ("drop_early", "wrong_object"))
    if behaviour == "idle":
        assert np.abs(actions[5:, :3]).max() < 0.005


@pytest.mark.parametrize("behaviour", ["random_walk", "play"])
def test_wanderers_move_all_over_the_place(stages, behaviour: str) -> None:
    _, actions, grasped = play_episode(stages, "put_carrot_on_plate", 5, behaviour, max_steps=50)
    assert np.abs(actions[:, :3]).max(axis=0).min() > 0.01
    assert len(np.unique(actions[:, 6].round())) == 2
    if behaviour == "play":
        assert "carrot" in grasped


def test_who_fumbles_grasps_and_misses_again_and_again(stages) -> None:
    closings, grasps = 0, 0
    for index in range(3):
        _, actions, grasped = play_episode(stages, "put_carrot_on_plate", index, "fumble", max_steps=60)
        closings += int((np.diff(actions[:, 6].round()) < 0).sum())
        held = np.array([name is not None for name in grasped])
        grasps += int((held[1:] & ~held[:-1]).sum())
    assert closings >= 9 and 2 <= grasps <= closings - 2
    _, actions, _ = play_episode(stages, "reach_target", 0, "fumble", max_steps=20)  # nothing there can be grasped
    assert (actions[:, 6] > 0.5).all()


def test_noise_zero_is_deterministic_and_seeds_matter_otherwise(stages) -> None:
    task = TASKS["stack_cubes"]
    from envs.mujoco_bridge import MujocoBridge

    twin = MujocoBridge(task, stage=stages(task))
    twin.reset(task.initial_states[0], np.random.default_rng(0))
    state, agent_pos = twin.task_state(), twin.agent_pos()

    def first(noise: float, seed: int) -> np.ndarray:
        return ScriptedExpert(task, noise=noise, seed=seed).act(state, agent_pos)

    assert (first(0.0, 1) == first(0.0, 2)).all()
    assert (first(0.5, 1) == first(0.5, 1)).all()
    assert (first(0.5, 1) != first(0.5, 2)).any()
    expert = ScriptedExpert(task, noise=0.5, seed=7)
    before = expert.act(state, agent_pos)
    expert.reset(7)
    assert (expert.act(state, agent_pos) == before).all()


def test_the_dial_goes_from_solving_to_failing(stages) -> None:
    rates = [
        np.mean([play_episode(stages, "stack_cubes", index, noise=noise)[0] for index in range(0, 24, 6)])
        for noise in (0.0, 1.0)
    ]
    assert rates[0] == 1.0
    assert rates[1] <= 0.25


def test_bad_arguments_are_named() -> None:
    task = TASKS["push_cube"]
    with pytest.raises(ValueError, match="behaviour must be one of .*'play'.*, got 'lazy'"):
        ScriptedExpert(task, "lazy")
    with pytest.raises(ValueError, match="noise must be >= 0, got -0.1"):
        ScriptedExpert(task, noise=-0.1)
    assert "expert" in BEHAVIOURS
