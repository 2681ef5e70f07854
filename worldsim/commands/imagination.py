"""Reinforcement in imagination, put together: the world model as an env, where rows begin, how success is probed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from envs.contexts import recorded_context
from envs.vector import find_task
from envs.world_model_bridge import WorldModelBridgeVectorEnv
from policies.actor import ActorNetwork, chunked
from policies.load import load_network, load_policy
from policies.reinforce import Arena, Probe, reinforce
from policies.reinforce_config import ReinforceConfig
from policies.sb3_train import SB3TrainConfig, train_sb3
from policies.torchrl_train import TorchRLTrainConfig, train_torchrl
from policies.train import demonstrated
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import wherever
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.files import write_atomic
from wfm_core.train import OnLog
from worldsim.evaluate import try_out
from worldsim.protocols import Policy
from worldsim.simulator import WorldSim, load_world_sim

JITTER = 0.01
"""m, of what is tried in the twin: as they are, a policy may know the initial states by heart."""
FROM_DATA = ("anywhere", "beginnings")
STARTS = (*FROM_DATA, "initial")


@dataclass
class ImaginedCommand:
    """Where, in imagination, a policy is trained.

    Attributes:
        tasks: what it is trained for, by name.
        world_model: in which it is trained, by shipped name or folder.
        compiled: compile its step first, which takes a minute or two and makes it about twice as fast.
        num_envs: rows of each task.
        starts: "anywhere" in recorded episodes, or at their "beginnings" (both need data); or "initial", the tasks'
            initial states.
        num_starts: of which as many are drawn from the recordings.
        horizon: control steps of an episode; 0 takes the task's.
        uncertainty_penalty: reward that a unit of uncertainty costs in every step.
        uncertainty_limit: episodes above it are truncated; null takes the world model's own.
        twin_probe: also try the policy in the twin now and then. The twin is not otherwise touched.
        num_probed: episodes of each task in a probe, from its initial states; in the twin these are jittered.
    """

    tasks: list[str] = field(default_factory=list)
    world_model: str = DEFAULT_WORLD_MODEL
    compiled: bool = False
    num_envs: int = 32
    starts: str = STARTS[0]
    num_starts: int = 500
    horizon: int = 20
    uncertainty_penalty: float = 0.0
    uncertainty_limit: float | None = None
    twin_probe: bool = False
    num_probed: int = 24

    def __post_init__(self) -> None:
        if self.starts not in STARTS:
            raise ValueError(f"starts must be one of {STARTS}, got {self.starts!r}")


@dataclass
class ReinforceCommand(ImaginedCommand):
    """Fine-tuning of a policy by reinforcement.

    Attributes:
        start: the policy to begin with, by shipped name or folder, of kind bc or wfm.
        rl: the algorithm's settings; every update visits each task.
        num_demos, demos_seed: how many demonstrations of each task in the data `rl.cloning` shows, 0 for all, and by
            which seed they are chosen; as in the policy's own cloning, for those that it has learnt from.
    """

    start: str = ""
    rl: ReinforceConfig = field(default_factory=ReinforceConfig)
    num_demos: int = 0
    demos_seed: int = 0


@dataclass
class SB3Command(ImaginedCommand):
    """Training from nothing by Stable-Baselines3's PPO, for one task.

    Attributes:
        ppo: the algorithm's settings.
    """

    ppo: SB3TrainConfig = field(default_factory=SB3TrainConfig)


@dataclass
class TorchRLCommand(ImaginedCommand):
    """Training from nothing by TorchRL's PPO, for one task.

    Attributes:
        ppo: the algorithm's settings.
    """

    ppo: TorchRLTrainConfig = field(default_factory=TorchRLTrainConfig)


type Command = ReinforceCommand | SB3Command | TorchRLCommand


def train_in_imagination(
    command: Command,
    caches: Sequence[ClipCache],
    out_dir: Path,
    *,
    line: str,
    on_update: OnLog | None = None,
) -> dict[str, float]:
    """Train one policy and write its folder; resumes if killed.

    Args:
        command: settings.
        caches: of the recordings that rows begin in.
        out_dir: the policy's folder; the run's state lies next to it in `<out_dir>.run`.
        line: the command line, for the card.
        on_update: called with the updates or steps made and what there is to tell.

    Returns:
        The last probe, and the steps made in either world.

    Raises:
        ValueError: the policy, the tasks, the recordings and the world model do not go together; says how.
    """
    stage = _Stage(command, load_world_sim(command.world_model, compiled=command.compiled), caches)
    if isinstance(command, ReinforceCommand):
        told = _onwards(command, stage, out_dir, on_update)
    else:
        told = _from_nothing(command, stage, out_dir, on_update)
    told["twin_probe_steps"] = stage.twin_steps
    write_atomic(out_dir / "training.json", (json.dumps(told, indent=1) + "\n").encode())
    probes = [Probe(**each) for each in told["probes"]]
    truths = ["" if each.true is None else f", true {each.true:.2f}" for each in probes]
    shown = "; ".join(f"imagined {each.imagined:.2f}{truth}" for each, truth in zip(probes, truths, strict=True))
    reason = f"; stopped: {told['stopped']}" if told.get("stopped") else ""
    card = [
        f"# {out_dir.name}", "",
        f"{getattr(command, 'start', 'PPO from nothing')}, trained in {command.world_model} for "
        f"{', '.join(command.tasks)}, by imagined experience alone.", "",
        f"- {told['imagined_steps']:.0f} imagined steps{reason}.",
        f"- Success as probed: {shown}.",
        f"- Command: `{line}`", f"- Settings: `{json.dumps(asdict(command))}`",
    ]  # fmt: skip
    write_atomic(out_dir / "CARD.md", ("\n".join(card) + "\n").encode())
    last = {name: value for name, value in asdict(probes[-1]).items() if value is not None}
    return last | {name: told[name] for name in ("imagined_steps", "twin_probe_steps")}


def _onwards(command: ReinforceCommand, stage: "_Stage", out_dir: Path, on_update: OnLog | None) -> dict[str, Any]:
    """Fine-tune a policy; returns what there is to tell."""
    if not command.start or not command.tasks:
        example = "reinforce.start=bc_30_demos 'reinforce.tasks=[push_cube]'"
        raise ValueError(f"reinforce needs a policy and tasks, for instance {example}")
    network = load_network(command.start)
    arenas = []
    for task in command.tasks:
        env = stage.training(task, network.sees, "Disabled", command.rl.seed)
        arenas.append(Arena(env, env.task_description, env.num_initial_states))
    run_dir = out_dir.with_name(out_dir.name + ".run")
    made_of = stage.made_of | {"start": wherever(command.start)}

    def probe(network: ActorNetwork, done: int) -> Probe:
        return stage.probe(chunked(network), network.sees)

    shown = None
    if command.rl.cloning:
        told = [arena.instruction for arena in arenas]
        shown = demonstrated(network, stage.caches, told, command.num_demos, command.demos_seed)
        made_of |= {"num_demos": command.num_demos, "demos_seed": command.demos_seed}
    found = reinforce(
        network, arenas, command.rl, run_dir, made_of=made_of, demonstrations=shown, probe=probe, on_update=on_update
    )
    network.save(out_dir)
    rows = [json.loads(row) for row in (run_dir / "updates.jsonl").read_text().splitlines()]
    return asdict(found) | {"imagined_steps": sum(row["steps"] for row in rows)}


def _from_nothing(
    command: SB3Command | TorchRLCommand, stage: "_Stage", out_dir: Path, on_update: OnLog | None
) -> dict[str, Any]:
    """Train the PPO of SB3 or TorchRL; returns what there is to tell."""
    if len(command.tasks) != 1:
        raise ValueError(f"their policies know one task, for instance 'sb3.tasks=[reach_target]', got {command.tasks}")
    (task,), world_model = command.tasks, wherever(command.world_model)
    if isinstance(command, SB3Command):
        from envs.sb3_env import SB3VecEnv

        env = SB3VecEnv(stage.training(task, "latents", "SameStep", command.ppo.seed))
        told = train_sb3(env, command.ppo, out_dir, made_of=stage.made_of, world_model=world_model, on_part=on_update)
    else:
        from envs.torchrl_env import TorchRLBridgeEnv

        env = TorchRLBridgeEnv(stage.training(task, "latents", "Disabled", command.ppo.seed))
        told = train_torchrl(
            env, command.ppo, out_dir, made_of=stage.made_of, world_model=world_model, on_update=on_update
        )
    probe = stage.probe(load_policy(out_dir), "latents")
    return told | {"probes": [asdict(probe)], "imagined_steps": command.ppo.num_steps}


class _Stage:
    """The worlds that a training runs in.

    Attributes:
        made_of: what decides about them, as JSON values.
        twin_steps: control steps made in the twin so far, none of which teaches anybody.
    """

    def __init__(self, command: ImaginedCommand, sim: WorldSim, caches: Sequence[ClipCache]) -> None:
        self.command, self.sim, self.caches, self.twin_steps = command, sim, caches, 0
        decide = {each.name for each in fields(ImaginedCommand)} - {"twin_probe", "num_probed", "compiled"}
        self.made_of = {name: value for name, value in asdict(command).items() if name in decide}
        self.made_of |= {"world_model": wherever(command.world_model), "data": [str(c.directory) for c in caches]}

    def training(self, task: str, sees: str, autoreset_mode: str, seed: int) -> WorldModelBridgeVectorEnv:
        """Return the imagined env that teaches a task."""
        command, context = self.command, None
        if command.starts in FROM_DATA:
            frame_shape = self.sim.world_model.frame_shape
            first = command.starts == "beginnings"
            context = recorded_context(self.caches, find_task(task), command.num_starts, seed, frame_shape, first=first)
        return self._imagined(
            task, sees, autoreset_mode=autoreset_mode, initial_context=context, num_envs=command.num_envs,
            max_episode_steps=command.horizon or None, reward="progress",
            uncertainty_penalty=command.uncertainty_penalty,
        )  # fmt: skip

    def probe(self, policy: Policy, sees: str) -> Probe:
        """Try a policy on the tasks' initial states, in imagination and, if asked to, in the twin."""
        rows = self.command.num_probed
        imagined = partial(self._imagined, sees=sees, num_envs=rows, autoreset_mode="Disabled")
        records = try_out(policy, imagined, self.command.tasks, rows, "imagined")
        uncertain = [record.max_uncertainty for record in records if np.isfinite(record.max_uncertainty)]
        success, true = np.mean([record.success for record in records]), None
        if self.command.twin_probe:
            from envs.mujoco_bridge import MujocoBridgeVectorEnv

            twin = partial(MujocoBridgeVectorEnv, rows, jitter=JITTER, autoreset_mode="Disabled")
            in_twin = try_out(policy, twin, self.command.tasks, rows, "twin")
            self.twin_steps += sum(record.length for record in in_twin)
            true = float(np.mean([record.success for record in in_twin]))
        return Probe(float(success), float(np.mean(uncertain or [np.inf])), true)

    def _imagined(self, task: str, sees: str, **settings: Any) -> WorldModelBridgeVectorEnv:
        limit = self.command.uncertainty_limit
        return WorldModelBridgeVectorEnv(
            world_model=self.sim, task=task, observation=sees, uncertainty_limit=limit, **settings
        )
