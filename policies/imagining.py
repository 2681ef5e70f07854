"""Rollouts for reinforcement: a policy that tries things out in a batched env, and what came of each of its decisions.

A decision is a chunk: what of it was executed, until the next decision or the episode's end, is one step of the Markov
decision process, with the discounted sum of its rewards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from policies.actor import ActorNetwork, instruction_id
from wfm_core.data.actions import ACTION_DIM
from worldsim.evaluate import VectorEnv
from worldsim.protocols import Obs

GRIPPER_SHARPNESS = 4.0
"""Factor on the gripper's logit."""
NUM_MOTIONS = ACTION_DIM - 1
MOTION = slice(0, NUM_MOTIONS)  # of an action, but for the gripper


class Explorer(nn.Module):
    """A policy that draws its actions, and says what they are worth.

    All motions of a decision are displaced by the same vector, normal with a standard deviation of `action_std`: a hand
    finds out what is a centimetre further left by going there, not by trembling. For the same reason the displacement
    of the next decision resembles it (`persistence`, the correlation of the two); each for itself is as likely as if it
    did not. The gripper opens where the network is sure of it; where it is not, chance decides, but not as often as the
    network has its doubts, or no hand would stay closed.
    """

    def __init__(self, network: ActorNetwork, action_std: float, persistence: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.action_std = action_std
        self.persistence = persistence
        last = nn.Linear(256, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.value_head = nn.Sequential(nn.Linear(network.known_dim, 256), nn.Tanh(), last)

    @property
    def num_executed(self) -> int:
        """Actions of a decision."""
        return self.network.config.num_executed

    def aims(self, known: Tensor) -> Tensor:
        """Return what the network would do, (B, E, 7) for the E actions of a decision, the gripper a logit."""
        aims = self.network.decide(known)[0][:, : self.num_executed].float()
        return torch.cat([aims[..., MOTION], GRIPPER_SHARPNESS * aims[..., -1:]], dim=-1)

    def displacements(self, before: Tensor | None, num_rows: int, generator: torch.Generator) -> Tensor:
        """Draw those of decisions, (B, 6), about those of the decisions `before` them; None: these are the first."""
        drawn = self.action_std * torch.randn(num_rows, NUM_MOTIONS, generator=generator)
        return drawn if before is None else self.persistence * before + math.sqrt(1 - self.persistence**2) * drawn

    def draw(self, known: Tensor, displacement: Tensor, generator: torch.Generator) -> Tensor:
        """Draw decisions (B, E, 7) displaced by (B, 6); motion may be beyond [-1, 1], the gripper is 1 or -1."""
        aims = self.aims(known)
        likely = aims[..., -1].sigmoid()
        gripper = torch.where(torch.rand(likely.shape, generator=generator) < likely, 1.0, -1.0)
        return torch.cat([aims[..., MOTION] + displacement[:, None], gripper[..., None]], dim=-1)

    def log_prob(self, known: Tensor, actions: Tensor) -> Tensor:
        """Log density (B, 1 + E) of decisions (B, E, 7): of the displacement first, then of each action's gripper."""
        aims = self.aims(known)
        away = (actions - aims)[..., MOTION].mean(dim=1)
        displaced = Normal(0.0, self.action_std, validate_args=False).log_prob(away).sum(dim=-1, keepdim=True)
        opened = Bernoulli(logits=aims[..., -1], validate_args=False).log_prob((actions[..., -1] > 0).float())
        return torch.cat([displaced, opened], dim=-1)

    def value(self, known: Tensor) -> Tensor:
        """What is to be expected (B,), discounted; the network is not taught by it."""
        return self.value_head(known.detach().float())[..., 0]


@dataclass
class Decisions:
    """N decisions and what came of them.

    Attributes:
        picture: (N, ...) as the network saw it.
        agent_pos: (N, 7).
        instruction_id: (N,) int64.
        actions: (N, E, 7), as drawn.
        log_prob: (N, 1 + E), of whom drew them.
        executed: (N,) int64, how many of its actions were executed, the first ones.
        reward: (N,) discounted sum over these.
        value: (N,) that was expected.
        next_value: (N,) expected of what came after; 0 after a terminated episode.
        next: (N,) int64, index of the decision after it in the same episode; -1: there is none.
        episode: (N,) int64.
        step: (N,) int64, of its episode, at which it was made.
    """

    picture: Tensor
    agent_pos: Tensor
    instruction_id: Tensor
    actions: Tensor
    log_prob: Tensor
    executed: Tensor
    reward: Tensor
    value: Tensor
    next_value: Tensor
    next: Tensor
    episode: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def take(self, rows: Tensor) -> "Decisions":
        """Return some of them."""
        return Decisions(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class Episodes:
    """The episodes of a rollout, in the order in which they began.

    Attributes:
        success: (M,) bool.
        ended: (M,) bool; the others were cut off.
        episode_return: (M,) sum of rewards.
        length: (M,) int64, control steps.
        initial_state: (M,) int64.
        uncertainty: (M,) mean over its steps.
        actions: M of (T, 7), as they were executed.
        agent_pos: M of (T + 1, 7).
    """

    success: np.ndarray
    ended: np.ndarray
    episode_return: np.ndarray
    length: np.ndarray
    initial_state: np.ndarray
    uncertainty: np.ndarray
    actions: list[np.ndarray]
    agent_pos: list[np.ndarray]


class _Log:
    """What a rollout writes down; one entry a decision or an episode."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.count = 0

    def add(self, **columns: Tensor) -> np.ndarray:
        """Append rows; returns their indices."""
        for name, column in columns.items():
            self.parts.setdefault(name, []).append(column)
        rows = len(next(iter(columns.values())))
        self.count += rows
        return np.arange(self.count - rows, self.count)

    def column(self, name: str) -> Tensor:
        """Return a column whole."""
        return torch.cat(self.parts[name])


@torch.no_grad()
def explore(
    explorer: Explorer,
    env: VectorEnv,
    instruction: str,
    num_steps: int,
    *,
    gamma: float,
    seeds: Sequence[int],
    generator: torch.Generator,
    initial_states: np.ndarray | None = None,
) -> tuple[Decisions, Episodes]:
    """Let every row act for `num_steps` control steps from new episodes on.

    Args:
        explorer: who acts.
        env: of B rows, with autoreset DISABLED.
        instruction: what to do.
        num_steps: of each row. Rows that end begin again; with `initial_states` they only wait for the others.
        gamma: discount of a control step.
        seeds: B, of the rows.
        generator: of the actions.
        initial_states: (B,) int64; None: as each row draws them.

    Raises:
        FloatingPointError: the policy's actions are not finite.
    """
    network, rows = explorer.network.eval(), env.num_envs
    which = instruction_id(network.config, instruction)
    options = {} if initial_states is None else {"initial_state": initial_states}
    obs, info = env.reset(seed=list(seeds), options=options)
    log, notes = _Log(), _Outcomes(rows, gamma)
    notes.begin(np.arange(rows), info["initial_state"], obs["agent_pos"])
    chunk = np.zeros((rows, explorer.num_executed, 7), np.float32)
    displaced = explorer.displacements(None, rows, generator)
    age = np.full(rows, explorer.num_executed)
    waiting = np.zeros(rows, bool)
    for _ in range(num_steps):
        asking = np.flatnonzero((age >= explorer.num_executed) & ~waiting)
        if len(asking):
            known, entry = _known(network, obs, asking, which)
            displaced[asking] = explorer.displacements(displaced[asking], len(asking), generator)
            actions = explorer.draw(known, displaced[asking], generator)
            if not actions.isfinite().all():
                raise FloatingPointError("the policy's actions are not finite")
            value = explorer.value(known)
            made = log.add(**entry, actions=actions, log_prob=explorer.log_prob(known, actions), value=value)
            notes.decide(asking, made, value.numpy())
            chunk[asking], age[asking] = actions.numpy(), 0
        actions = np.where(waiting[:, None], 0, chunk[np.arange(rows), np.minimum(age, explorer.num_executed - 1)])
        actions = actions.clip(-1, 1)
        obs, reward, terminated, truncated, info = env.step(actions)
        notes.observe(~waiting, reward, age, info, actions, obs["agent_pos"])
        age += 1
        ended = terminated | truncated
        if ended.any():
            over = ended & ~waiting
            if len(late := np.flatnonzero(over & truncated)):
                notes.expect(late, explorer.value(_known(network, obs, late, which)[0]).numpy())
            notes.end(np.flatnonzero(over), info)
            obs, info = env.reset(options={"reset_mask": ended})
            age[ended] = explorer.num_executed
            displaced[ended] = explorer.displacements(None, int(ended.sum()), generator)
            if initial_states is None:
                notes.begin(np.flatnonzero(ended), info["initial_state"], obs["agent_pos"])
            else:
                waiting |= ended
        if waiting.all():
            break
    if len(left := np.flatnonzero(~waiting)):
        notes.expect(left, explorer.value(_known(network, obs, left, which)[0]).numpy())
    written = {name: log.column(name) for name in log.parts}
    return Decisions(**written, **notes.of_decisions()), notes.of_episodes()


def _known(network: ActorNetwork, obs: Obs, rows: np.ndarray, which: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What decides in these rows, and what the network needs to know it again."""
    picture = network.picture({name: value[rows] for name, value in obs.items()})
    told = {
        "agent_pos": torch.from_numpy(obs["agent_pos"][rows]),
        "instruction_id": torch.full((len(rows),), which),
    }
    return network.know(network.look(picture), **told), told | {"picture": picture}


class _Outcomes:
    """What became of decisions and episodes, row by row."""

    def __init__(self, num_rows: int, gamma: float) -> None:
        self.gamma = gamma
        self.decision = np.full(num_rows, -1)  # under way in each row
        self.episode = np.full(num_rows, -1)
        self.decisions: dict[str, list[float]] = {
            name: [] for name in ("executed", "reward", "next_value", "next", "episode", "step")
        }
        self.episodes: list[dict[str, float]] = []
        self.actions: list[list[np.ndarray]] = []
        self.agent_pos: list[list[np.ndarray]] = []

    def begin(self, rows: np.ndarray, initial_states: np.ndarray, agent_pos: np.ndarray) -> None:
        self.decision[rows] = -1
        for row in rows:
            self.episode[row] = len(self.episodes)
            state = int(initial_states[row])
            self.episodes.append(
                {"success": 0, "ended": 0, "episode_return": 0, "length": 0, "initial_state": state, "uncertainty": 0}
            )
            self.actions.append([])
            self.agent_pos.append([agent_pos[row].copy()])

    def decide(self, rows: np.ndarray, made: np.ndarray, value: np.ndarray) -> None:
        for row, index, expected in zip(rows, made, value, strict=True):
            if (before := self.decision[row]) >= 0:
                self.decisions["next"][before], self.decisions["next_value"][before] = index, expected
            episode = int(self.episode[row])
            step = len(self.actions[episode])
            blank = {"executed": 0, "reward": 0.0, "next_value": 0.0, "next": -1, "episode": episode, "step": step}
            for name, entry in blank.items():
                self.decisions[name].append(entry)
            self.decision[row] = index

    def observe(
        self,
        active: np.ndarray,
        reward: np.ndarray,
        age: np.ndarray,
        info: Mapping[str, np.ndarray],
        actions: np.ndarray,
        agent_pos: np.ndarray,
    ) -> None:
        for row in np.flatnonzero(active):
            index, episode = self.decision[row], self.episodes[self.episode[row]]
            self.actions[self.episode[row]].append(actions[row].copy())
            self.agent_pos[self.episode[row]].append(agent_pos[row].copy())
            self.decisions["executed"][index] += 1
            self.decisions["reward"][index] += self.gamma ** int(age[row]) * float(reward[row])
            episode["episode_return"] += float(reward[row])
            episode["length"] += 1
            episode["uncertainty"] += float(np.nan_to_num(info["uncertainty"][row]))

    def expect(self, rows: np.ndarray, value: np.ndarray) -> None:
        for row, expected in zip(rows, value, strict=True):
            if (index := self.decision[row]) >= 0:
                self.decisions["next_value"][index] = float(expected)

    def end(self, rows: np.ndarray, info: Mapping[str, np.ndarray]) -> None:
        for row in rows:
            self.episodes[self.episode[row]] |= {"success": int(info["is_success"][row]), "ended": 1}

    def of_decisions(self) -> dict[str, Tensor]:
        whole = ("executed", "next", "episode", "step")
        return {
            name: torch.tensor(column, dtype=torch.int64 if name in whole else torch.float32)
            for name, column in self.decisions.items()
        }

    def of_episodes(self) -> Episodes:
        columns = {name: np.array([each[name] for each in self.episodes]) for name in self.episodes[0]}
        length = columns["length"]
        return Episodes(
            success=columns["success"].astype(bool),
            ended=columns["ended"].astype(bool),
            episode_return=columns["episode_return"].astype(np.float64),
            length=length,
            initial_state=columns["initial_state"],
            uncertainty=columns["uncertainty"] / length.clip(min=1),
            actions=[np.reshape(each, (-1, ACTION_DIM)).astype(np.float32) for each in self.actions],
            agent_pos=[np.stack(each) for each in self.agent_pos],
        )
