"""Fine-tune a policy by reinforcement in batched envs: the loop, what it keeps, and when it stops."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

from policies.actor import ActorNetwork
from policies.imagining import Decisions, Episodes, Explorer, explore
from policies.policy_gradient import advantages, group_advantages, learn
from policies.reinforce_config import ReinforceConfig, is_trained
from policies.run_state import RunState, seed_of
from policies.self_imitation import Successes, imitate, in_hindsight
from wfm_core.train import Batch
from worldsim.evaluate import VectorEnv

MOST_BATCHES = 1_000_000
"""Of demonstrations in an update, so that those of two updates differ."""


@dataclass(frozen=True)
class Arena:
    """Where a policy is trained for one task.

    Attributes:
        env: of B rows, autoreset DISABLED.
        instruction: what to do there.
        num_initial_states: the env's.
    """

    env: VectorEnv
    instruction: str
    num_initial_states: int


@dataclass(frozen=True)
class Probe:
    """How good the policy is, its mean actions taken.

    Attributes:
        imagined: success in imagination, in [0, 1].
        uncertainty: the largest of each imagined episode, their mean.
        true: success in the twin or on a robot; None: not asked for.
    """

    imagined: float
    uncertainty: float
    true: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        updates: made.
        stopped: why, if it was by rule; else "".
        probes: in their order.
    """

    updates: int
    stopped: str
    probes: tuple[Probe, ...]


type ProbeFn = Callable[[ActorNetwork, int], Probe]
"""Takes the network and the number of updates made."""


class StopRule:
    """Says when to stop: imagined success has risen since the first probe, and so has what speaks against it."""

    def __init__(self, config: ReinforceConfig) -> None:
        self.config = config
        self.probes: list[Probe] = []
        self.against = 0

    def __call__(self, probe: Probe) -> str:
        """Take the next probe; return why to stop, or ""."""
        self.probes.append(probe)
        first, reasons = self.probes[0], []
        if probe.imagined > first.imagined:
            if probe.uncertainty > self.config.uncertainty_growth * first.uncertainty:
                reasons.append(f"uncertainty {probe.uncertainty:.3g}, at first {first.uncertainty:.3g}")
            if probe.true is not None and first.true is not None:
                gap, gap_first = probe.imagined - probe.true, first.imagined - first.true
                if gap > gap_first + self.config.gap_growth:
                    reasons.append(f"imagined less true success {gap:.2f}, at first {gap_first:.2f}")
        self.against = self.against + 1 if reasons else 0
        return "; ".join(reasons) if self.against >= self.config.patience else ""


def reinforce(
    network: ActorNetwork,
    arenas: Sequence[Arena],
    config: ReinforceConfig,
    run_dir: Path,
    *,
    made_of: Mapping[str, object] | None = None,
    demonstrations: Callable[[int], Batch] | None = None,
    probe: ProbeFn | None = None,
    on_update: Callable[[int, dict[str, float]], None] | None = None,
) -> Outcome:
    """Train `network` in place, resuming from `run_dir` if something is there.

    A rollout begins anew in every update, from seeds that its number gives, so that a run that was killed goes on as it
    would have.

    Args:
        network: the policy to begin with.
        arenas: where it acts; every update visits each.
        config: settings.
        run_dir: holds `state.safetensors`, and a row for each update in `updates.jsonl`.
        made_of: what the arenas and the network are made of, as JSON values; it must be the run's own.
        demonstrations: batches by number, from `policies.train.demonstrated`; needed by `config.cloning`.
        probe: asked before the first update, every `probe_every` and after the last.
        on_update: called with the number of updates made and what there is to tell.

    Returns:
        What came of it.

    Raises:
        ValueError: the state in `run_dir` is of another run, or damaged; or rows are not a number of whole groups.
        FloatingPointError: actions, the loss or its gradient are not finite; names the last good state.
    """
    for arena in arenas:
        if config.objective == "group" and arena.env.num_envs % config.group_size:
            raise ValueError(f"num_envs must be a multiple of group_size={config.group_size}, got {arena.env.num_envs}")
    if config.cloning and demonstrations is None:
        raise ValueError(f"cloning={config.cloning} needs demonstrations, got none")
    decides = {name: value for name, value in asdict(config).items() if name != "num_updates"}  # it may be made longer
    torch.manual_seed(config.seed)  # parameter initialisation has no generator argument
    explorer = Explorer(network, config.action_std, config.persistence)
    start = copy.deepcopy(explorer).requires_grad_(False) if config.kl else None
    actor = [parameter for name, parameter in network.named_parameters() if is_trained(name, config.trained)]
    optimizer = torch.optim.Adam(
        [
            {"params": actor, "lr": config.learning_rate},
            {"params": explorer.value_head.parameters(), "lr": config.value_learning_rate},
        ]
    )
    state = RunState(run_dir / "state.safetensors", explorer, optimizer, decides | dict(made_of or {}))
    kept = state.resume()
    successes = Successes(run_dir / "successes", network, config.trained, kept.get("updates", 0))
    done, rows = kept.get("updates", 0), _Rows(run_dir / "updates.jsonl", kept.get("updates", 0))
    rule, stopped = StopRule(config), ""
    for each in kept.get("probes", []):
        stopped = rule(Probe(**each))
    if probe is not None and not rule.probes:
        rule(probe(network, 0))
    while done < config.num_updates and not stopped:
        try:
            row = _update(explorer, start, optimizer, arenas, demonstrations, successes, config, done)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, in update {done + 1}; the last good state is in {run_dir}") from error
        done += 1
        if probe is not None and (done % config.probe_every == 0 or done == config.num_updates):
            stopped = rule(found := probe(network, done))
            row |= {name: value for name, value in asdict(found).items() if value is not None}
        rows.add(done, row)
        state.keep({"updates": done, "probes": [asdict(each) for each in rule.probes]})
        if on_update is not None:
            on_update(done, row)
    return Outcome(done, stopped, tuple(rule.probes))


def _update(
    explorer: Explorer,
    start: Explorer | None,
    optimizer: torch.optim.Optimizer,
    arenas: Sequence[Arena],
    demonstrations: Callable[[int], Batch] | None,
    successes: Successes,
    config: ReinforceConfig,
    number: int,
) -> dict[str, float]:
    """Roll out in every arena, and learn from all of it; returns what there is to tell."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, number))
    parts, told, good = [], [], []
    for which, arena in enumerate(arenas):
        rng = np.random.default_rng([config.seed, number, which])
        begun = None
        if config.objective == "group":
            groups = arena.env.num_envs // config.group_size
            begun = rng.integers(arena.num_initial_states, size=groups).repeat(config.group_size)
        decisions, episodes = explore(
            explorer,
            arena.env,
            arena.instruction,
            config.rollout_steps,
            gamma=config.gamma,
            seeds=rng.integers(2**31, size=arena.env.num_envs).tolist(),
            generator=generator,
            initial_states=begun,
        )
        if config.objective == "imitation":
            good.append(in_hindsight(decisions, episodes, explorer.network.config.chunk_len))
        if begun is None:
            parts.append((decisions, *advantages(decisions, config.gamma, config.gae_lambda)))
        else:
            advantage, counts = group_advantages(decisions, episodes, config.group_size)
            kept = counts.nonzero()[:, 0]
            parts.append((decisions.take(kept), advantage[kept], decisions.value[kept]))
        told.append(episodes)
    decisions = Decisions(
        **{name: torch.cat([getattr(part[0], name) for part in parts]) for name in Decisions.__annotations__}
    )
    advantage, target = (torch.cat([part[k] for part in parts]) for k in (1, 2))
    row = _told(told) | {"decisions": float(len(decisions))}
    if not len(decisions):
        return row
    shown = None
    if config.cloning and demonstrations is not None:
        shown = (demonstrations(k) for k in count(number * MOST_BATCHES))
    if config.objective == "imitation":
        successes.add(number, {name: torch.cat([each[name] for each in good]) for name in good[0]})
        return row | imitate(explorer, optimizer, successes, shown, config, generator)
    advantage = (advantage - advantage.mean()) / advantage.std().clamp(min=1e-6) if len(advantage) > 1 else advantage
    acts = number >= config.value_warmup or config.objective == "group"  # groups need no value
    return row | learn(explorer, start, optimizer, decisions, advantage, target, acts, shown, config, generator)


def _told(episodes: Sequence[Episodes]) -> dict[str, float]:
    """What a rollout shows: success and return of the episodes that ended, steps, uncertainty."""
    ended = np.concatenate([each.ended for each in episodes])
    length = np.concatenate([each.length for each in episodes])
    uncertainty = np.concatenate([each.uncertainty for each in episodes])
    shown = {"episodes": float(ended.sum()), "steps": float(length.sum())}
    shown["rollout_uncertainty"] = float((uncertainty * length).sum() / length.sum())
    for name in ("success", "episode_return"):
        column = np.concatenate([getattr(each, name) for each in episodes])[ended]
        shown[f"rollout_{name}"] = float(column.mean()) if len(column) else float("nan")
    return shown


class _Rows:
    """A line of JSON for each update."""

    def __init__(self, path: Path, done: int) -> None:
        """Keep what is there of the first `done` updates."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in there if json.loads(line)["update"] <= done))

    def add(self, done: int, row: Mapping[str, float]) -> None:
        """Append an update."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"update": done, **row}) + "\n")
