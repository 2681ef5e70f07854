"""How well the imagined ranking of the shipped policies agrees with the physics twin.

    python benchmarks/ranking_agreement.py [--quick] [--world-model NAME_OR_FOLDER] [--out FOLDER]

The full run takes every shipped policy, all six tasks and all 24 initial states in both worlds (an hour or so on two
cores; it goes on where it was interrupted if --out names a folder). --quick takes four policies, two tasks and four
episodes, to see that everything works: its figures mean little. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from policies import shipped_policies
from worldsim.commands.rank import RankConfig, run

QUICK_TASKS = ("reach_target", "put_carrot_on_plate")
STATISTICS = ("pearson", "spearman", "kendall", "mmrv", "top1_regret", "bias", "mean_absolute_error")


def figures(ranking: dict[str, Any]) -> dict[str, Any]:
    """Take the benchmark's figures from a ranking."""
    agreement = ranking["agreement"]
    result: dict[str, Any] = {
        "num_policies": len(ranking["policies"]),
        "num_tasks": len(ranking["tasks"]),
        "num_episodes": ranking["num_episodes"],
    }
    for level in ("policies", "cells"):
        for name in STATISTICS:
            if name in agreement[level]:
                key = name if name in ("mmrv", "top1_regret") else f"{name}_{level}"
                result[key] = agreement[level][name]
    card = ranking["reward_card"]
    result["success_head_accuracy"] = card["head_on_truth"]["accuracy"] if card["head_on_truth"] else None
    result["false_success_rate"] = card["false_success"]["all"]["success"] if card["false_success"] else None
    result["seconds"] = ranking["provenance"]["seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four policies, two tasks, four episodes")
    parser.add_argument("--world-model", default=RankConfig.world_model, help="shipped name or checkpoint folder")
    parser.add_argument("--policies", nargs="+", default=None, help="names or paths; all shipped ones by default")
    parser.add_argument("--out", default=None, help="folder to keep episodes and report in; a temporary one by default")
    arguments = parser.parse_args()
    names = arguments.policies or shipped_policies()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or temporary
        config = RankConfig(policies=names, world_model=arguments.world_model, out=out)
        if arguments.quick:
            config.policies = names[:: max(1, len(names) // 4)][:4]
            config.tasks = list(QUICK_TASKS)
            config.num_episodes, config.num_videos, config.num_probe_episodes = 4, 1, 1
        run(config)
        ranking = json.loads((Path(out) / "ranking.json").read_text())
    print(json.dumps(figures(ranking), allow_nan=False))


# Worker processes import this file too.
if __name__ == "__main__":
    main()
