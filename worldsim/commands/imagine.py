"""Let a policy act in imagination, and keep what it did as a data set: demonstrations that nobody had to give.

    worldsim-imagine policy=bc_all_demos 'tasks=[push_cube]' num_episodes=200 out=runs/imagined

Episodes that are imagined to succeed are kept (keep=all keeps every one); one in which the world model becomes too
uncertain ends there. The data set is a LeRobotDataset v3.0 as worldsim-record writes it, of behaviour "imagined":
worldsim-train-policy data=[runs/demos,runs/imagined] 'bc.behaviours=[expert,imagined]' learns from both. Interrupt it
and start it again with the same settings: it goes on where it stopped.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from tqdm import tqdm

from tasks import TASKS
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.data.episode import Episode
from wfm_core.data.files import write_atomic
from wfm_core.data.lerobot_v3_writer import assemble_dataset, stage_episode, staged_indices
from wfm_core.data.video import ENCODINGS
from worldsim.commands.entry import launch, register
from worldsim.evaluate import Cell, EpisodeRecord, Pair, Trace, evaluate
from worldsim.recording import claimed, deciding
from worldsim.simulator import WorldSim, load_world_sim

BEHAVIOUR = "imagined"
KEEP = ("success", "all")


@dataclass
class ImagineConfig:
    """Who acts, where, and what is kept.

    Attributes:
        policy: shipped name, checkpoint folder, or .zip of Stable-Baselines3.
        out: folder of the data set.
        tasks: names of `tasks.TASKS`; empty: all.
        num_episodes: tried of each task, from its initial states in turn.
        world_model: shipped name or checkpoint folder.
        uncertainty_limit: episodes above it end; null takes the world model's own.
        keep: "success" keeps what is imagined to succeed, "all" everything.
        num_envs: episodes imagined at once.
        seed: of the first episode.
        encoding: of the video, "lossless" or "compact".
    """

    policy: str = ""
    out: str = "runs/imagined"
    tasks: list[str] = field(default_factory=list)
    num_episodes: int = 96
    world_model: str = DEFAULT_WORLD_MODEL
    uncertainty_limit: float | None = None
    keep: str = KEEP[0]
    num_envs: int = 32
    seed: int = 0
    encoding: str = "lossless"

    def __post_init__(self) -> None:
        for name, choices in (("keep", KEEP), ("encoding", tuple(ENCODINGS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("num_episodes", "num_envs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(config: ImagineConfig) -> None:
    """Imagine what is missing and print where it is.

    Raises:
        ValueError: no such policy, task or world model; nothing was kept; or `out` holds something else.
        OSError: the disk is full; what is imagined so far is kept.
    """
    if not config.policy:
        raise ValueError("policy must name who acts, for instance policy=bc_all_demos")
    out, tried = Path(config.out), len(config.tasks or TASKS) * config.num_episodes
    staging = out / ".staging"
    with claimed(out, "imagine", deciding(config), asdict(ImagineConfig())):
        if not (out / "meta" / "info.json").exists():
            _imagine(config, staging)
            if not staged_indices(staging):
                raise ValueError(f"none of {tried} imagined episodes succeeded; keep=all keeps them, too")
            assemble_dataset(staging, out, encoding=ENCODINGS[config.encoding])
        if staging.exists():
            shutil.rmtree(staging)
    from wfm_core.data.lerobot_v3 import LeRobotV3Reader

    print(f"{len(LeRobotV3Reader(out))} of {tried} imagined episodes are kept in {out.resolve()}")


def _imagine(config: ImagineConfig, staging: Path) -> None:
    """Stage the episodes that are kept, part by part; a part that is done has a file that says so."""
    from policies import load_policy

    policy, sim = load_policy(config.policy), load_world_sim(config.world_model)
    parts = list(_parts(config))
    for number, (task, pairs) in enumerate(tqdm(parts, desc="imagine", unit="batch")):
        if (mark := staging / f"part-{number:05d}").exists():
            continue
        env = _env(config, sim, task)
        found: dict[Pair, tuple[EpisodeRecord, Trace | None]] = {}
        take = partial(_take, found)
        cell = Cell(config.policy, "", "imagined", "", task)
        evaluate(policy, env, pairs, cell, instruction=env.task_description, on_record=take, traced=pairs)
        for place, pair in enumerate(pairs):
            record, trace = found[pair]
            if trace is not None and (record.success or config.keep == "all"):
                episode = _episode(record, trace, env.task_description, config.world_model)
                stage_episode(staging, number * config.num_envs + place, episode, ENCODINGS[config.encoding])
        write_atomic(mark, b"")


def _parts(config: ImagineConfig) -> Iterator[tuple[str, list[Pair]]]:
    """Tasks, and up to `num_envs` pairs of (initial state, seed) that are imagined together."""
    for task in config.tasks or list(TASKS):
        if task not in TASKS:
            raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {task!r}")
        count = len(TASKS[task].initial_states)
        pairs = [(k % count, config.seed + k) for k in range(config.num_episodes)]
        for first in range(0, len(pairs), config.num_envs):
            yield task, pairs[first : first + config.num_envs]


def _env(config: ImagineConfig, sim: WorldSim, task: str) -> Any:
    from envs.world_model_bridge import WorldModelBridgeVectorEnv

    return WorldModelBridgeVectorEnv(
        min(config.num_envs, config.num_episodes), sim, task, autoreset_mode="Disabled",
        uncertainty_limit=config.uncertainty_limit,
    )  # fmt: skip


def _take(found: dict[Pair, Any], record: EpisodeRecord, trace: Trace | None) -> None:
    found[record.pair] = (record, trace)


def _episode(record: EpisodeRecord, trace: Trace, instruction: str, world_model: str) -> Episode:
    success = np.zeros(len(trace.frames), bool)
    success[-1] = record.success
    meta: dict[str, str | int | float | bool] = {
        "behaviour": BEHAVIOUR, "task_name": record.task, "policy": record.policy, "world_model": world_model,
        "uncertainty": record.max_uncertainty,
    }  # fmt: skip
    name = f"{record.task}-{record.initial_state}-{record.seed}"
    return Episode(
        trace.frames, trace.actions, trace.agent_pos, instruction, name, "commanded", 1, {"success": success}, meta
    )


register("imagine", ImagineConfig, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="imagine")
def main(config: Any) -> None:
    """Run the console script."""
    launch("imagine", config, ImagineConfig, run)


if __name__ == "__main__":
    main()
