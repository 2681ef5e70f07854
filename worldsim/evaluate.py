"""Roll a policy out on a fixed list of episodes in a batched env: a record for each episode asked for, none twice."""

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from tasks.task import REWARD_TERMS
from wfm_core.data.actions import ACTION_DIM, to_physical
from worldsim.protocols import Obs, Policy

Pair = tuple[int, int]
"""(initial state, seed): which episode, the same for every policy and in every world."""


class VectorEnv(Protocol):
    """What `evaluate` needs of a Gymnasium vector env, with autoreset DISABLED and the info of the project's envs."""

    num_envs: int

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes in the rows of `options["reset_mask"]`, from `options["initial_state"]`."""
        ...

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance all rows by one control step with (B, 7) actions in [-1, 1]."""
        ...

    def close(self) -> Any:
        """Free what the env holds."""
        ...


@dataclass(frozen=True)
class Cell:
    """What the episodes of one evaluation have in common.

    Attributes:
        policy: the policy's name.
        policy_hash: content hash of the policy.
        world: the world's name, "imagined" or "twin".
        world_hash: content hash of the world.
        task: the task's name.
        settings: whatever else decides an episode's outcome (horizon, uncertainty limit), as canonical JSON.
    """

    policy: str
    policy_hash: str
    world: str
    world_hash: str
    task: str
    settings: str = "{}"

    def key(self, pair: Pair) -> str:
        """Return the content hash of an episode: names (of policy and world) do not enter, what they stand for does."""
        content = [self.policy_hash, self.world_hash, self.task, self.settings, *map(int, pair)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class EpisodeRecord(Cell):
    """The outcome of one episode.

    Attributes:
        initial_state: index of the task's initial state.
        seed: the seed of env and policy.
        success: whether the task was solved (and held).
        episode_return: sum of rewards.
        length: control steps.
        end_reason: "success", "failure", "horizon" or "uncertainty".
        max_uncertainty: largest uncertainty of a step (inf if it was not a number); 0 in an exact world.
        final_terms: reward terms of the last step, by name.
        mean_terms: reward terms averaged over the episode, by name.
        wall_time: seconds from reset to end, with the other rows of the batch running beside it.
    """

    initial_state: int = 0
    seed: int = 0
    success: bool = False
    episode_return: float = 0.0
    length: int = 0
    end_reason: str = ""
    max_uncertainty: float = 0.0
    final_terms: Mapping[str, float] = field(default_factory=dict)
    mean_terms: Mapping[str, float] = field(default_factory=dict)
    wall_time: float = 0.0

    @property
    def pair(self) -> Pair:
        """(initial state, seed)."""
        return self.initial_state, self.seed


@dataclass(frozen=True)
class Trace:
    """What was seen and done in one episode.

    Attributes:
        frames: (T + 1, H, W, 3) uint8.
        agent_pos: (T + 1, 7) float32.
        actions: (T, 7) float32, physical units.
    """

    frames: np.ndarray
    agent_pos: np.ndarray
    actions: np.ndarray


class _Row:
    """The episode under way in one row of the batch."""

    def __init__(self, pair: Pair, traced: bool, started: float) -> None:
        self.pair, self.traced, self.started = pair, traced, started
        self.rewards: list[float] = []
        self.terms: list[list[float]] = []
        self.max_uncertainty = 0.0
        self.frames: list[np.ndarray] = []
        self.agent_pos: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []

    def see(self, obs: Obs, row: int) -> None:
        if self.traced:  # copies, or each small slice would keep its whole batch alive
            self.frames.append(np.array(obs["pixels"][row]))
            self.agent_pos.append(np.array(obs["agent_pos"][row]))

    def record(self, cell: Cell, end_reason: str, success: bool, now: float) -> EpisodeRecord:
        terms = np.array(self.terms)
        return EpisodeRecord(
            **asdict(cell),
            initial_state=int(self.pair[0]),
            seed=int(self.pair[1]),
            success=success,
            episode_return=float(np.sum(self.rewards)),
            length=len(self.rewards),
            end_reason=end_reason,
            max_uncertainty=self.max_uncertainty,
            final_terms=dict(zip(REWARD_TERMS, terms[-1].tolist(), strict=True)),
            mean_terms=dict(zip(REWARD_TERMS, terms.mean(0).tolist(), strict=True)),
            wall_time=now - self.started,
        )

    def trace(self) -> Trace | None:
        if not self.traced:
            return None
        return Trace(np.stack(self.frames), np.stack(self.agent_pos), np.stack(self.actions))


def evaluate(
    policy: Policy,
    env: VectorEnv,
    pairs: Sequence[Pair],
    cell: Cell,
    *,
    instruction: str,
    on_record: Callable[[EpisodeRecord, Trace | None], None] | None = None,
    traced: Collection[Pair] = (),
) -> list[EpisodeRecord]:
    """Run every episode of `pairs` once.

    A row that finishes takes the next pair, whatever the other rows do, and all are waited for: counting the first to
    finish would favour short episodes. The result does not depend on the number of rows.

    Args:
        policy: acts; its rows are restarted with the env's.
        env: B rows of the cell's task, autoreset DISABLED.
        pairs: the episodes, each once.
        cell: labels of the records.
        instruction: the task's language instruction.
        on_record: called with each record as soon as its episode ends, and with its trace if one was asked for.
        traced: pairs whose frames, proprioception and actions are kept.

    Returns:
        One record a pair, in the order of `pairs`.

    Raises:
        ValueError: a pair occurs twice, or the policy's actions are not (B, 7) finite numbers.
    """
    if len(set(pairs)) != len(pairs):
        raise ValueError(
            f"every (initial state, seed) pair must occur once, got {len(pairs) - len(set(pairs))} repeats"
        )
    if not pairs:
        return []
    waiting = deque(pairs)
    now = time.perf_counter()
    rows: list[_Row | None] = [None] * env.num_envs
    # What each row runs. Without an episode left a row repeats its last one and nobody looks: the batch keeps its size.
    running = [pairs[min(row, len(pairs) - 1)] for row in range(env.num_envs)]
    for row in range(min(env.num_envs, len(pairs))):
        rows[row] = _Row(waiting.popleft(), running[row] in traced, now)
    obs = _restart(policy, env, running, instruction, np.ones(env.num_envs, bool), first=True)
    for row, episode in enumerate(rows):
        if episode:
            episode.see(obs, row)

    records: dict[Pair, EpisodeRecord] = {}
    while len(records) < len(pairs):
        actions = _checked_actions(policy.act(obs), cell, running)
        obs, reward, terminated, truncated, info = env.step(actions)
        ended = np.asarray(terminated) | np.asarray(truncated)
        physical = to_physical(np.clip(actions, -1, 1))
        now = time.perf_counter()
        for row, episode in enumerate(rows):
            if episode is None:
                continue
            uncertainty = float(info["uncertainty"][row])
            episode.max_uncertainty = max(episode.max_uncertainty, math.inf if math.isnan(uncertainty) else uncertainty)
            episode.rewards.append(float(reward[row]))
            episode.terms.append([float(info[f"reward.{name}"][row]) for name in REWARD_TERMS])
            if episode.traced:
                episode.actions.append(physical[row])
            episode.see(obs, row)
            if ended[row]:
                success = bool(info["is_success"][row])
                record = episode.record(cell, str(info["end_reason"][row]), success, now)
                records[episode.pair] = record
                if on_record:
                    on_record(record, episode.trace())
                rows[row] = None
        if len(records) < len(pairs) and ended.any():
            begun = []
            for row in np.flatnonzero(ended):
                if waiting:
                    running[row] = waiting.popleft()
                    rows[row] = _Row(running[row], running[row] in traced, time.perf_counter())
                    begun.append(row)
            obs = _restart(policy, env, running, instruction, ended, first=False)
            for row in begun:
                rows[row].see(obs, row)
    return [records[pair] for pair in pairs]


def try_out(
    policy: Policy, make: Callable[[str], Any], tasks: Sequence[str], num_episodes: int, world: str
) -> list[EpisodeRecord]:
    """Run a policy on the tasks' initial states in turn, seed k in episode k.

    Args:
        policy: acts.
        make: gives a Bridge vector env of a task, autoreset DISABLED; it is closed afterwards.
        tasks: their names.
        num_episodes: of each task.
        world: name of what `make` makes.
    """
    records = []
    for task in tasks:
        env = make(task)
        pairs = [(k % env.num_initial_states, k) for k in range(num_episodes)]
        records += evaluate(policy, env, pairs, Cell("", "", world, "", task), instruction=env.task_description)
        env.close()
    return records


def _restart(
    policy: Policy, env: VectorEnv, running: list[Pair], instruction: str, mask: np.ndarray, *, first: bool
) -> Any:
    seeds = [int(seed) for _, seed in running]
    initial_states = [int(state) for state, _ in running]
    obs, _ = env.reset(seed=seeds, options={"initial_state": initial_states, "reset_mask": mask.copy()})
    policy.reset(env.num_envs, instruction=instruction, seeds=seeds, mask=None if first else mask.copy())
    return obs


def _checked_actions(actions: np.ndarray, cell: Cell, running: list[Pair]) -> np.ndarray:
    actions = np.asarray(actions, dtype=np.float32)
    where = f"policy {cell.policy!r} on task {cell.task!r}"
    if actions.shape != (len(running), ACTION_DIM):
        raise ValueError(f"actions of {where} must have shape ({len(running)}, {ACTION_DIM}), got {actions.shape}")
    finite = np.isfinite(actions).all(1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        state, seed = running[row]
        raise ValueError(
            f"actions of {where} must be finite, got {actions[row].tolist()} (initial state {state}, seed {seed})"
        )
    return actions
