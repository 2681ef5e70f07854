"""How many demonstrations a policy born from the world model needs, and others, for the same success in the twin.

    python benchmarks/data_efficiency.py --data runs/demos [--quick] [--kinds wfm scratch bc act] [--sizes 10 25 50]
        [--seeds 0 1 2] [--world-model NAME_OR_FOLDER] [--out outputs/data_efficiency]

Kinds: wfm has the world model's trunk and weights, scratch the same network with random ones, bc is the convolutional
policy, act LeRobot's ACT on the tokenizer's latents. Each is cloned from as many demonstrations of each task, once for
each seed, and tried in the twin on every task's initial states. What is trained and tried is kept in --out; start it
again with the same settings and it goes on. The last line is one JSON object; its `demos_for_scratch_100` is the
fewest demonstrations with which wfm is as good as scratch with 100.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.mujoco_bridge import MujocoBridgeVectorEnv
from policies import load_policy
from policies.lerobot_train import ACTTrainConfig
from policies.recipes import Recipe, train_policy
from policies.train import BCTrainConfig, WFMTrainConfig
from tasks import TASKS
from wfm_core import DEFAULT_WORLD_MODEL
from worldsim.caches import open_caches
from worldsim.evaluate import try_out

NUM_STEPS = {10: 1000, 25: 1200, 50: 1500, 100: 2000, 200: 2500}
"""Of gradient, by demonstrations; as the shipped policies were trained."""
MAX_EPISODES_AT_ONCE = 24


def recipes(world_model: str) -> dict[str, Recipe]:
    """Kind -> its settings, but for demonstrations, steps and seed."""
    born = WFMTrainConfig(world_model=world_model, num_views=1)
    return {
        "wfm": born,
        "scratch": replace(born, initialised=False),
        "bc": BCTrainConfig(),
        "act": ACTTrainConfig(world_model=world_model, num_views=1),
    }


def success(folder: Path, tasks: Sequence[str], num_episodes: int) -> dict[str, float]:
    """Success in the twin of the policy in a folder, by task."""
    rows = min(num_episodes, MAX_EPISODES_AT_ONCE)
    twin = partial(MujocoBridgeVectorEnv, rows, autoreset_mode="Disabled")
    records = try_out(load_policy(folder), twin, tasks, num_episodes, "twin")
    return {task: float(np.mean([each.success for each in records if each.task == task])) for task in tasks}


def interval(cells: Sequence[dict[str, float]], num_episodes: int) -> tuple[float, float]:
    """95% interval of the mean success of several seeds: seeds, and episodes within each, drawn anew."""
    rng = np.random.default_rng(0)
    rates = np.array([list(cell.values()) for cell in cells])  # (seeds, tasks)
    drawn = rates[rng.integers(len(rates), size=(2000, len(rates)))]
    means = (rng.binomial(num_episodes, drawn) / num_episodes).mean(axis=(1, 2))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="recorded data sets with demonstrations")
    parser.add_argument("--quick", action="store_true", help="ten steps, one seed, two sizes, two episodes")
    parser.add_argument("--kinds", nargs="+", default=["wfm", "scratch", "bc", "act"])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(NUM_STEPS), help="demonstrations of each task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="that the policies are tried on")
    parser.add_argument("--episodes", type=int, default=24, help="of each task")
    parser.add_argument("--world-model", default=DEFAULT_WORLD_MODEL)
    parser.add_argument("--out", type=Path, default=Path("outputs/data_efficiency"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.seeds, arguments.episodes = arguments.sizes[:2], arguments.seeds[:1], 2
        arguments.out = arguments.out / "quick"
    torch.set_num_threads(1)
    caches = [str(cache.directory) for cache in open_caches(arguments.data)]
    table: dict[str, dict[int, dict[str, Any]]] = {}
    for kind in arguments.kinds:
        for size in arguments.sizes:
            cells = []
            for seed in arguments.seeds:
                folder = arguments.out / f"{kind}_{size}_{seed}"
                steps = 10 if arguments.quick else NUM_STEPS.get(size, max(NUM_STEPS.values()))
                recipe = replace(recipes(arguments.world_model)[kind], num_demos=size, num_steps=steps, seed=seed)
                found = folder.with_suffix(f".{arguments.episodes}.json")
                if not found.exists():
                    if not (folder / "CARD.md").exists():
                        train_policy(recipe, caches, folder)
                    found.write_text(json.dumps(success(folder, arguments.tasks, arguments.episodes)))
                cells.append(json.loads(found.read_text()))
            mean = float(np.mean([list(cell.values()) for cell in cells]))
            low, high = interval(cells, arguments.episodes)
            by_task = {task: float(np.mean([cell[task] for cell in cells])) for task in arguments.tasks}
            table.setdefault(kind, {})[size] = {"success": mean, "interval": [low, high], "tasks": by_task}
            print(f"{kind:>8} {size:4} demonstrations: {mean:.2f} [{low:.2f}, {high:.2f}]", flush=True)
    wanted = table.get("scratch", {}).get(100, {}).get("success", np.inf)
    enough = [size for size, cell in table.get("wfm", {}).items() if cell["success"] >= wanted]
    print(
        json.dumps({
            "demos_for_scratch_100": min(enough, default=None),
            "table": table,
            "seeds": arguments.seeds,
            "episodes_of_each_task": arguments.episodes,
            "world_model": arguments.world_model,
            "quick": arguments.quick,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
