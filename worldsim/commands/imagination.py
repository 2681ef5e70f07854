"""Reinforcement in imagination, put together: the world model as an env, where rows begin, how success is probed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from policies.actor import ActorNetwork, chunked
from policies.load import load_network
from policies.reinforce import Arena, Probe, ReinforceConfig, reinforce
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import wherever
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.train import OnLog
from worldsim.evaluate import Cell, evaluate
from worldsim.simulator import WorldSim, load_world_sim

STARTS = ("anywhere", "initial")


@dataclass
class ReinforceCommand:
    """Fine-tuning by reinforcement in imagination.

    Attributes:
        start: the policy to begin with, by shipped name or folder, of kind bc or wfm.
        tasks: what it is trained for, by name; every update visits each.
        world_model: in which it is trained, by shipped name or folder.
        num_envs: rows of each task.
        starts: "anywhere", in recorded episodes (needs data); or "initial", the tasks' initial states.
        num_starts: of which as many are drawn from the recordings.
        horizon: control steps of an episode; 0 takes the task's.
        uncertainty_penalty: reward that a unit of uncertainty costs in every step.
        uncertainty_limit: episodes above it are truncated; null takes the world model's own.
        twin_probe: also try the policy in the twin now and then. The twin is not otherwise touched.
        num_probed: episodes of each task in a probe, from its initial states.
        rl: the algorithm's settings.
    """

    start: str = ""
    tasks: list[str] = field(default_factory=list)
    world_model: str = DEFAULT_WORLD_MODEL
    num_envs: int = 32
    starts: str = STARTS[0]
    num_starts: int = 500
    horizon: int = 20
    uncertainty_penalty: float = 0.0
    uncertainty_limit: float | None = None
    twin_probe: bool = False
    num_probed: int = 24
    rl: ReinforceConfig = field(default_factory=ReinforceConfig)

    def __post_init__(self) -> None:
        if self.starts not in STARTS:
            raise ValueError(f"starts must be one of {STARTS}, got {self.starts!r}")


def train_in_imagination(
    command: ReinforceCommand, caches: Sequence[ClipCache], out_dir: Path, *, line: str, on_update: OnLog | None = None
) -> dict[str, float]:
    """Train one policy and write its folder; resumes if killed.

    Args:
        command: settings.
        caches: of the recordings that rows begin in.
        out_dir: the policy's folder; the run's state lies next to it in `<out_dir>.run`.
        line: the command line, for the card.
        on_update: called with the number of updates made and what there is to tell.

    Returns:
        The last probe, "imagined" and, if asked for, "true" success, and the steps made in either world.

    Raises:
        ValueError: the policy, the tasks, the recordings and the world model do not go together; says how.
    """
    if not command.start or not command.tasks:
        example = "reinforce.start=bc_30_demos 'reinforce.tasks=[push_cube]'"
        raise ValueError(f"reinforce needs a policy and tasks, for instance {example}")
    network = load_network(command.start)
    sim = load_world_sim(command.world_model)
    prober = _Prober(command, sim)
    made_of = {name: value for name, value in asdict(command).items() if name not in ("rl", "twin_probe", "num_probed")}
    made_of |= {"world_model": wherever(command.world_model), "data": [str(cache.directory) for cache in caches]}
    arenas = [_arena(command, sim, network.sees, task, caches) for task in command.tasks]
    run_dir = out_dir.with_name(out_dir.name + ".run")
    found = reinforce(network, arenas, command.rl, run_dir, made_of=made_of, probe=prober, on_update=on_update)
    network.save(out_dir)
    rows = [json.loads(row) for row in (run_dir / "updates.jsonl").read_text().splitlines()]
    told = {"imagined_steps": sum(row["steps"] for row in rows), "twin_probe_steps": prober.twin_steps}
    write_atomic(out_dir / "reinforce.json", (json.dumps(asdict(found) | told, indent=1) + "\n").encode())
    first, last = found.probes[0], found.probes[-1]
    card = [
        f"# {out_dir.name}", "",
        f"{command.start}, trained on by reinforcement in {command.world_model} for {', '.join(command.tasks)}.", "",
        f"- {found.updates} updates, {told['imagined_steps']:.0f} imagined steps"
        + (f"; stopped: {found.stopped}." if found.stopped else "."),
        f"- Imagined success {first.imagined:.2f}, at last {last.imagined:.2f}"
        + ("." if last.true is None else f"; in the twin {first.true:.2f}, at last {last.true:.2f}."),
        f"- Command: `{line}`", f"- Settings: `{json.dumps(asdict(command))}`",
    ]  # fmt: skip
    write_atomic(out_dir / "CARD.md", ("\n".join(card) + "\n").encode())
    shown = {name: value for name, value in asdict(last).items() if value is not None}
    return shown | told


def _arena(command: ReinforceCommand, sim: WorldSim, sees: str, task: str, caches: Sequence[ClipCache]) -> Arena:
    from envs.contexts import anywhere_context
    from envs.vector import find_task

    found = find_task(task)
    context = None
    if command.starts == "anywhere":
        context = anywhere_context(caches, found, command.num_starts, command.rl.seed, sim.world_model.frame_shape)
    env = _imagined(
        command, sim, task, sees, context, num_envs=command.num_envs, max_episode_steps=command.horizon or None,
        reward="progress", uncertainty_penalty=command.uncertainty_penalty,
    )  # fmt: skip
    return Arena(env, found.instruction, env.num_initial_states)


def _imagined(command: ReinforceCommand, sim: WorldSim, task: str, sees: str, context=None, **settings):
    from envs.world_model_bridge import WorldModelBridgeVectorEnv

    return WorldModelBridgeVectorEnv(
        world_model=sim, task=task, initial_context=context, observation=sees, autoreset_mode="Disabled",
        uncertainty_limit=command.uncertainty_limit, **settings,
    )  # fmt: skip


class _Prober:
    """Tries a policy on the tasks' initial states, in imagination and, if asked to, in the twin.

    Attributes:
        twin_steps: control steps made in the twin so far, none of which teaches anybody.
    """

    def __init__(self, command: ReinforceCommand, sim: WorldSim) -> None:
        self.command, self.sim, self.twin_steps = command, sim, 0

    def __call__(self, network: ActorNetwork, done: int) -> Probe:
        """Probe after `done` updates."""
        imagined, uncertainty = self._tried(network, twin=False)
        true = self._tried(network, twin=True)[0] if self.command.twin_probe else None
        return Probe(imagined, uncertainty, true)

    def _tried(self, network: ActorNetwork, *, twin: bool) -> tuple[float, float]:
        """Success and mean of the episodes' largest uncertainty."""
        records = []
        for task in self.command.tasks:
            env = self._env(network.sees, task, twin=twin)
            pairs = [(k % env.num_initial_states, k) for k in range(self.command.num_probed)]
            cell = Cell("probed", "", "twin" if twin else "imagined", "", task)
            records += evaluate(chunked(network), env, pairs, cell, instruction=env.task_description)
            env.close()
        if twin:
            self.twin_steps += sum(record.length for record in records)
        uncertain = [record.max_uncertainty for record in records if np.isfinite(record.max_uncertainty)]
        return float(np.mean([record.success for record in records])), float(np.mean(uncertain or [np.inf]))

    def _env(self, sees: str, task: str, *, twin: bool):
        rows = self.command.num_probed
        if not twin:
            return _imagined(self.command, self.sim, task, sees, num_envs=rows)
        from envs.mujoco_bridge import MujocoBridgeVectorEnv

        return MujocoBridgeVectorEnv(rows, task, autoreset_mode="Disabled")
