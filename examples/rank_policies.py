"""Compare two policies on one task, in imagination and in the twin, on the same episodes (`worldsim-rank` does many).

python examples/rank_policies.py --policies A B --task put_carrot_on_plate --num-episodes 24
"""

import argparse
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from policies import load_policy, policy_hash, shipped_policies
from tasks import TASKS
from worldsim.evaluate import Cell, evaluate
from worldsim.ranking import paired_difference, wilson_interval

WORLDS = {"imagined": "WorldModel-Bridge-v0", "twin": "MujocoBridge-v0"}


def outcomes(world: str, policy_name: str, task: str, num_episodes: int) -> np.ndarray:
    """(num_episodes,) bool: which episodes the policy solves; episode k is the same for every policy and world."""
    env = gym.make_vec(
        f"envs:{WORLDS[world]}", num_envs=min(num_episodes, 24), task=task, autoreset_mode=AutoresetMode.DISABLED
    )
    pairs = [(k % len(TASKS[task].initial_states), k) for k in range(num_episodes)]
    cell = Cell(policy_name, policy_hash(policy_name), world, WORLDS[world], task)
    records = evaluate(load_policy(policy_name), env, pairs, cell, instruction=TASKS[task].instruction)
    env.close()
    return np.array([record.success for record in records])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs=2, default=shipped_policies()[:2], metavar=("A", "B"))
    parser.add_argument("--task", default="put_carrot_on_plate", choices=TASKS)
    parser.add_argument("--num-episodes", type=int, default=24)
    args = parser.parse_args(argv)
    differences = {}
    for world in WORLDS:
        a, b = (outcomes(world, name, args.task, args.num_episodes) for name in args.policies)
        print(f"\n{world}, {args.task}")
        for name, solved in zip(args.policies, (a, b), strict=True):
            low, high = wilson_interval(int(solved.sum()), solved.size)
            print(f"  {name:24s} {solved.mean():4.0%}   95% interval {low:4.0%} to {high:4.0%}")
        # Paired, because both ran the same episodes: what is hard for one is mostly hard for the other.
        gap = paired_difference(a[None], b[None], rng=np.random.default_rng(0))
        print(f"  difference {gap.value:+.0%}   95% interval {gap.low:+.0%} to {gap.high:+.0%}   p = {gap.p_value:.2g}")
        differences[world] = gap.value
    return differences


if __name__ == "__main__":
    main()
