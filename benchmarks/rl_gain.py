"""What reinforcement in imagination gains in the twin, beside the same in the twin itself and more cloning.

    python benchmarks/rl_gain.py --start runs/policies/weak --data runs/demos [--quick] [--tasks stack_cubes ...]
        [--arms imagined twin initial_starts whole_episodes unlimited blind ppo group]
        [--cloned runs/policies/weak_but_longer] [--seeds 0 1 2 3 4] [--world-model NAME_OR_FOLDER] [--updates 30]
        [--cloning 1.0] [--demos 50] [--out outputs/rl_gain]

Every arm begins with the same policy and goes on for one task: "imagined" in the world model alone, from moments of the
data; "twin" for as many control steps in the twin, from its initial states with jitter. The others are "imagined" with
one switch thrown: from the initial states only, in whole episodes, without a limit on uncertainty, without the
demonstrations that it is shown beside, or with another objective. All are then tried in the twin, on the initial states
with jitter, and in imagination, on these states as they are; so is --cloned. What is trained and tried is kept in
--out; start it again with the same settings and it goes on. Intervals are of the mean over tasks; seeds and initial
states are drawn anew.
The last line is one JSON object.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.mujoco_bridge import MujocoBridgeVectorEnv
from envs.vector import find_task
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from policies.actor import ActorNetwork, chunked
from policies.load import load_network
from policies.reinforce import Arena, reinforce
from policies.reinforce_config import ReinforceConfig
from policies.train import demonstrated
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.data.clip_cache import ClipCache
from worldsim.caches import open_caches
from worldsim.commands.imagination import JITTER, ReinforceCommand, train_in_imagination
from worldsim.evaluate import try_out

SIMPLER = ("put_spoon_on_towel", "put_carrot_on_plate", "stack_cubes", "put_eggplant_in_basket")
SWITCHES: dict[str, dict[str, Any]] = {
    "imagined": {},
    "initial_starts": {"starts": "initial"},
    "whole_episodes": {"horizon": 0},
    "unlimited": {"uncertainty_limit": np.inf},
    "blind": {"cloning": 0.0},
    "ppo": {"objective": "ppo", "learning_rate": 3e-5, "action_std": 0.08},
    "group": {"objective": "group", "learning_rate": 3e-5, "action_std": 0.08},
}
"""Arm -> what it changes of `ReinforceCommand`, or of its algorithm."""


def learn_in_imagination(
    folder: Path, command: ReinforceCommand, caches: list[ClipCache], arm: str
) -> tuple[ActorNetwork, dict[str, float]]:
    """Train by one of `SWITCHES`; returns the policy and what there is to tell."""
    changes = SWITCHES[arm]
    algorithm = {name: value for name, value in changes.items() if hasattr(ReinforceConfig, name)}
    command = replace(command, **{name: value for name, value in changes.items() if name not in algorithm})
    command = replace(command, rl=replace(in_rollouts_of(command.rl, horizon(command)), **algorithm))
    told = train_in_imagination(command, caches, folder, line="benchmarks/rl_gain.py")
    assert not told["twin_probe_steps"]
    return load_network(folder), {"steps": told["imagined_steps"]}


def learn_in_the_twin(
    folder: Path, command: ReinforceCommand, caches: list[ClipCache]
) -> tuple[ActorNetwork, dict[str, float]]:
    """Train with the same algorithm for as many control steps, each episode from an initial state to its end."""
    network, (task,) = load_network(command.start), command.tasks
    config = in_rollouts_of(command.rl, horizon(replace(command, horizon=0)))
    env = MujocoBridgeVectorEnv(command.num_envs, task, autoreset_mode="Disabled", reward="progress", jitter=JITTER)
    arena, shown = Arena(env, env.task_description, env.num_initial_states), None
    if config.cloning:
        shown = demonstrated(network, caches, [arena.instruction], command.num_demos, command.demos_seed)
    reinforce(network, [arena], config, folder.with_name(folder.name + ".run"), demonstrations=shown)
    env.close()
    return network, {"steps": config.num_updates * config.rollout_steps * command.num_envs}


def horizon(command: ReinforceCommand) -> int:
    """Control steps of an episode."""
    return command.horizon or find_task(command.tasks[0]).max_episode_steps


def in_rollouts_of(config: ReinforceConfig, steps: int) -> ReinforceConfig:
    """The same number of control steps in all, in rollouts that are as long as an episode."""
    return replace(config, rollout_steps=steps, num_updates=max(1, config.num_updates * config.rollout_steps // steps))


def try_policy(network: ActorNetwork, world_model: str, task: str, num_episodes: int) -> dict[str, list[bool]]:
    """Success in the twin, on the initial states with jitter, and in imagination, on these states, by episode."""
    rows = min(24, num_episodes)
    imagined = partial(
        WorldModelBridgeVectorEnv, rows, world_model, observation=network.sees, autoreset_mode="Disabled"
    )
    worlds = {
        "true": partial(MujocoBridgeVectorEnv, rows, jitter=JITTER, autoreset_mode="Disabled"),
        "imagined": imagined,
    }
    found = {}
    for name, make in worlds.items():
        records = try_out(chunked(network), make, [task], num_episodes, name)
        found[name] = [bool(each.success) for each in records]
    return found


def interval(gains: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of gains (tasks, seeds, episodes); seeds, and each task's episodes, are drawn anew."""
    rng, means = np.random.default_rng(0), []
    tasks, seeds, episodes = gains.shape
    for _ in range(4000):
        of_seeds = gains[:, rng.integers(seeds, size=seeds)].mean(axis=1)  # (tasks, episodes)
        means.append(np.take_along_axis(of_seeds, rng.integers(episodes, size=(tasks, episodes)), axis=1).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="policy to begin with, of kind bc or wfm")
    parser.add_argument("--cloned", default="", help="the same, cloned for longer on the same data: the arm cloned")
    parser.add_argument("--data", nargs="+", required=True, help="recorded data sets in whose moments rows begin")
    parser.add_argument(
        "--quick", action="store_true", help="two updates of few rows, one task, one seed, two episodes"
    )
    parser.add_argument("--tasks", nargs="+", default=list(SIMPLER))
    parser.add_argument("--arms", nargs="+", choices=[*SWITCHES, "twin"], default=["imagined", "twin"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--cloning", type=float, default=1.0, help="weight of demonstrations in the data")
    parser.add_argument("--demos", type=int, default=0, help="how many of each task, as cloned by --start; 0: all")
    parser.add_argument("--episodes", type=int, default=48, help="of each task, to try a policy")
    parser.add_argument("--world-model", default=DEFAULT_WORLD_MODEL)
    parser.add_argument("--out", type=Path, default=Path("outputs/rl_gain"))
    arguments = parser.parse_args()
    rows, steps = 64, 40
    if arguments.quick:
        arguments.tasks, arguments.seeds, arguments.updates = arguments.tasks[:1], arguments.seeds[:1], 2
        arguments.episodes, arguments.out, rows, steps = 2, arguments.out / "quick", 8, 6
    torch.set_num_threads(1)
    caches = open_caches(arguments.data)

    def cell(arm: str, task: str, seed: int) -> dict[str, Any]:
        folder = arguments.out / f"{arm}_{task}_{seed}"
        found = folder.with_suffix(f".{arguments.episodes}.json")
        if not found.exists():
            algorithm = ReinforceConfig(
                num_updates=arguments.updates, rollout_steps=steps, trained="readout", cloning=arguments.cloning,
                probe_every=arguments.updates, seed=seed,
            )  # fmt: skip
            command = ReinforceCommand(
                tasks=[task], world_model=arguments.world_model, compiled=not arguments.quick, num_envs=rows,
                horizon=steps, num_probed=rows, start=arguments.start, rl=algorithm, num_demos=arguments.demos,
            )  # fmt: skip
            if arm in SWITCHES:
                network, told = learn_in_imagination(folder, command, caches, arm)
            elif arm == "twin":
                network, told = learn_in_the_twin(folder, command, caches)
            else:
                network, told = load_network(getattr(arguments, arm)), {}
            told: dict[str, Any] = told | try_policy(network, arguments.world_model, task, arguments.episodes)
            found.parent.mkdir(parents=True, exist_ok=True)
            found.write_text(json.dumps(told))
        return json.loads(found.read_text())

    table: dict[str, Any] = {}
    before = np.array([cell("start", task, 0)["true"] for task in arguments.tasks], float)
    for arm in ["start", *(["cloned"] if arguments.cloned else []), *arguments.arms]:
        seeds = [0] if arm in ("start", "cloned") else arguments.seeds
        cells = [[cell(arm, task, seed) for seed in seeds] for task in arguments.tasks]
        true, imagined = (
            np.array([[each[name] for each in row] for row in cells], float) for name in ("true", "imagined")
        )
        gains = true - before[:, None]  # (tasks, seeds, episodes)
        table[arm] = {
            "success": true.mean(),
            "gain": gains.mean(),
            "interval": interval(gains),
            "gap": (imagined - true).mean(),
            "tasks": dict(zip(arguments.tasks, true.mean(axis=(1, 2)).tolist(), strict=True)),
        }
        low, high = table[arm]["interval"]
        print(f"{arm:>14}: {true.mean():.2f}, gain {gains.mean():+.2f} [{low:+.2f}, {high:+.2f}], "
              f"imagined {imagined.mean():.2f}", flush=True)  # fmt: skip
    gained = table.get("imagined", {})
    print(
        json.dumps({
            "gain": gained.get("gain"),
            "gap": gained.get("gap"),
            "table": table,
            "seeds": arguments.seeds,
            "updates": arguments.updates,
            "episodes_of_each_task": arguments.episodes,
            "world_model": arguments.world_model,
            "quick": arguments.quick,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
