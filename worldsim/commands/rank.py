"""Rank policies in an imagined Bridge, beside the ground truth of the physics twin.

    worldsim-rank policies=all tasks=all out=runs/rank
    worldsim-rank 'policies=[bc-large,runs/mine]' 'tasks=[stack_cubes]' num_episodes=12 twin=false

Every policy runs from the same initial states with the same seeds, in both worlds. Afterwards `out` holds report.html
(open it in a browser), ranking.json, episodes.parquet, and in store/ every episode. Interrupt it and start it again: it
goes on where it stopped. With more policies, tasks or episodes in the same `out` only what is new is evaluated.
"""

import contextlib
import difflib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
from tqdm import tqdm

from tasks import TASKS
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.data.files import write_atomic
from worldsim import judging
from worldsim.commands.entry import launch, register
from worldsim.contest import Contest, Judge, World, episode_pairs, hold_contest
from worldsim.evaluate import VectorEnv
from worldsim.hashing import code_hash, content_hash
from worldsim.leaderboard import IMAGINED, TWIN, as_text
from worldsim.processes import locked
from worldsim.report import write_report
from worldsim.simulator import WorldSim, load_world_sim
from worldsim.store import EpisodeStore, write_parquet

ALL = "all"
ENV_MODULES = ("arguments", "info", "judging", "spaces", "vector")
"""Modules of `envs` that both worlds run."""


@dataclass
class RankConfig:
    """What to rank, and where.

    Attributes:
        policies: a shipped name or path, or a list of them; "all" takes all that are shipped.
        tasks: a task name or a list of them; "all" takes all.
        world_model: shipped name or path of the world model to imagine with.
        num_episodes: episodes of each policy on each task, spread over the task's 24 initial states.
        twin: whether to run the same episodes in the physics twin too.
        out: folder of the results.
        seed: episode k has seed `seed` + k, for every policy.
        num_envs: most imagined episodes that run side by side.
        workers: processes for the twin and torch threads for imagination; 0 takes the number of cores.
        device: where to imagine: "cpu", "cuda", or "auto".
        num_videos: episodes of each policy and task whose video is kept for the report; more can only be had for
            episodes still to be evaluated, so choose before the first run into `out`.
        num_probe_episodes: episodes a task of the policies that should fail (no-op, random, shuffled actions).
        uncertainty_limit: imagined episodes above it end; null takes the world model's own.
    """

    policies: Any = ALL  # a name or a list of names, which OmegaConf has no type for
    tasks: Any = ALL
    world_model: str = DEFAULT_WORLD_MODEL
    num_episodes: int = 24
    twin: bool = True
    out: str = "runs/rank"
    seed: int = 0
    num_envs: int = 16
    workers: int = 0
    device: str = "auto"
    num_videos: int = 4
    num_probe_episodes: int = 6
    uncertainty_limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_episodes", "num_envs", "workers", "seed", "num_videos", "num_probe_episodes"):
            least = int(name in ("num_episodes", "num_envs"))
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("policies", "tasks"):
            names = getattr(self, name)
            setattr(self, name, [names] if isinstance(names, str) else list(names or ()))
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, or be {ALL!r}, got none")


def run(config: RankConfig) -> None:
    """Evaluate what is missing, write the ranking and the report, and print where they are.

    Raises:
        ValueError: an unknown task, policy or world model, or one that does not work.
        OSError: the disk is full; what is evaluated so far is kept.
        ImportError: the twin or a policy needs a library that is not installed; says how to install it.
        RuntimeError: a worker process failed.
    """
    import torch

    started = time.perf_counter()
    cores = config.workers or len(os.sched_getaffinity(0))
    # Makefiles and shells often set OMP_NUM_THREADS=1 for the worker processes; imagination runs alone and takes all
    # cores.
    torch.set_num_threads(cores)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out), EpisodeStore(out / "store") as store:
        contest, judge = prepare(config)
        ranking, records = hold_contest(
            contest, store, _Bars(), num_envs=config.num_envs, num_workers=cores, judge=judge, seed=config.seed
        )
        ranking["world_model"] = {"name": config.world_model, "hash": contest.imagined.hash}
        ranking["twin"] = {"hash": contest.twin.hash} if contest.twin else None
        ranking["provenance"] = provenance(time.perf_counter() - started, cores)
        write_atomic(out / "ranking.json", json.dumps(ranking, indent=1, allow_nan=False).encode() + b"\n")
        write_parquet(records, out / "episodes.parquet")
        write_report(ranking, records, store, out / "report.html")
    print(f"\n{as_text(ranking)}\n")
    for name, what in (("report.html", "report"), ("ranking.json", "figures"), ("episodes.parquet", "episodes")):
        print(f"{what:<9} {(out / name).resolve()}")


def prepare(config: RankConfig) -> tuple[Contest, Judge]:
    """Find and check everything before anything is evaluated.

    Raises:
        ValueError: an unknown task, policy or world model (names the nearest), or one that does not load.
        ImportError: a library is missing; says how to install it.
    """
    import policies
    from policies.load import load_policy

    tasks = {name: TASKS[name] for name in _chosen("tasks", config.tasks, list(TASKS))}
    shipped = policies.shipped_policies()
    sources = shipped if ALL in config.policies else list(config.policies)
    if not sources:
        raise ValueError("policies must name at least one: this installation ships none")
    named = {_policy_name(source, shipped, sources): source for source in sources}
    if len(named) < len(sources):
        raise ValueError(f"every policy must occur once, got {sources}")
    hashes = {}
    code = code_hash([Path(policies.__file__).parent])
    for name, source in named.items():
        try:
            load_policy(source)
            hashes[name] = f"{policies.policy_hash(source)}-{code}"
        except ValueError as error:
            raise ValueError(f"policy {source!r} cannot be loaded: {error}") from error
    states = min(len(task.initial_states) for task in tasks.values())
    sim = load_world_sim(config.world_model, _device(config.device))
    contest = Contest(
        policies=named,
        hashes=hashes,
        instructions={name: task.instruction for name, task in tasks.items()},
        pairs=episode_pairs(config.num_episodes, states, config.seed),
        imagined=_imagined_world(config, sim),
        twin=_twin_world() if config.twin else None,
        load_policy=load_policy,
        num_videos=config.num_videos,
        num_probe_pairs=config.num_probe_episodes,
    )
    return contest, partial(judging.judge, sim)


def provenance(seconds: float, cores: int) -> dict[str, Any]:
    """Say when, where and with what a ranking was made."""
    import torch

    libraries = ("worldsim", "torch", "mujoco", "lerobot", "numpy")
    versions = {}
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "command": " ".join(["worldsim-rank", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {cores} cores used",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def _imagined_world(config: RankConfig, sim: WorldSim) -> World:
    import envs
    import wfm_core
    import worldsim
    from envs.contexts import CONTEXTS_PATH
    from wfm_core.checkpoint import find_checkpoint

    envs_dir, here = Path(envs.__file__).parent, Path(worldsim.__file__).parent
    code = code_hash(
        [
            Path(wfm_core.__file__).parent,
            *(here / f"{name}.py" for name in ("evaluate", "heads", "probes", "simulator", "state")),
            *(envs_dir / f"{name}.py" for name in (*ENV_MODULES, "contexts", "world_model_bridge")),
        ]
    )
    weights = "scripted" if config.world_model == "scripted" else content_hash(find_checkpoint(config.world_model))
    limit = sim.calibration.uncertainty_limit if config.uncertainty_limit is None else config.uncertainty_limit
    return World(
        IMAGINED,
        f"{weights}-{content_hash(CONTEXTS_PATH)}-{code}-{_tasks_hash()}",
        {name: _settings(max_episode_steps=t.max_episode_steps, uncertainty_limit=limit) for name, t in TASKS.items()},
        partial(_make_imagined, sim, limit),
    )


def _twin_world() -> World:
    try:
        mujoco_version = metadata.version("mujoco")
    except metadata.PackageNotFoundError as error:
        raise ImportError("twin=true needs MuJoCo: pip install 'worldsim[twin]'; or rank with twin=false") from error
    import envs
    import wfm_core
    import worldsim

    envs_dir, here, core = (Path(package.__file__).parent for package in (envs, worldsim, wfm_core))
    files = [*sorted(envs_dir.glob("mujoco_*.py")), *(envs_dir / f"{name}.py" for name in ENV_MODULES)]
    code = code_hash([*files, here / "evaluate.py", here / "probes.py", core / "data" / "actions.py"])
    return World(
        TWIN,
        f"{content_hash(envs_dir / 'assets')}-{code}-{_tasks_hash()}-mujoco-{mujoco_version}",
        {name: _settings(max_episode_steps=task.max_episode_steps) for name, task in TASKS.items()},
        _make_twin,
    )


def _make_imagined(sim: WorldSim, uncertainty_limit: float, task: str, num_envs: int) -> VectorEnv:
    from gymnasium.vector import AutoresetMode

    from envs.world_model_bridge import WorldModelBridgeVectorEnv

    return WorldModelBridgeVectorEnv(
        num_envs, sim, task, autoreset_mode=AutoresetMode.DISABLED, uncertainty_limit=uncertainty_limit
    )


def _make_twin(task: str, num_envs: int) -> VectorEnv:
    from gymnasium.vector import AutoresetMode

    from envs.mujoco_bridge import MujocoBridgeVectorEnv

    return MujocoBridgeVectorEnv(num_envs, task, autoreset_mode=AutoresetMode.DISABLED)


def _tasks_hash() -> str:
    import tasks

    return code_hash([Path(tasks.__file__).parent])


def _settings(**settings: float) -> str:
    return json.dumps(settings, sort_keys=True)


def _chosen(kind: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    if ALL in names:
        return list(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{kind} must be among {', '.join(known)}, got {name!r}; did you mean {nearest!r}?")
    return list(dict.fromkeys(names))


def _policy_name(source: str, shipped: Sequence[str], sources: Sequence[str]) -> str:
    """Call a policy by its shipped name or its folder's, or by its whole path where folders share a name."""
    if source in shipped:
        return source
    names = [other if other in shipped else Path(other).name for other in sources]
    name = Path(source).name
    return name if names.count(name) == 1 else str(Path(source))


def _device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu") and not name.startswith("cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' or 'auto' where there is no GPU, got {name!r}")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


class _Bars:
    """A progress bar a stage."""

    def begin(self, stage: str, total: int, finished: int) -> None:
        self._bar = tqdm(total=total, initial=finished, desc=f"{stage:<9}", unit="episode", dynamic_ncols=True)

    def advance(self, where: str) -> None:
        self._bar.set_postfix_str(where, refresh=False)
        self._bar.update()

    def end(self) -> None:
        self._bar.set_postfix_str("")
        self._bar.close()


register("rank", RankConfig, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="rank")
def main(config: Any) -> None:
    """Run the console script."""
    launch("rank", config, RankConfig, run)


if __name__ == "__main__":
    main()
