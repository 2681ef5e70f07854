"""What both twins have in common: a natively batched Gymnasium env, and a single env that is one row of it."""

import abc
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.arguments import checked_actions, checked_initial_states, checked_reset_mask, checked_seeds
from envs.info import first_row, first_row_info, joined_info, masked_info
from envs.judging import REWARDS, Rules, StepResult, judge
from envs.spaces import AGENT_POS_HIGH, AGENT_POS_LOW, action_space
from tasks import TASKS
from tasks.task import REWARD_TERMS, Task
from wfm_core.data.actions import ACTION_DIM, CONTROL_HZ

Obs = dict[str, np.ndarray]


def find_task(name: str, tasks: Mapping[str, Task] = TASKS) -> Task:
    """Look a task up by name.

    Raises:
        ValueError: there is no such task; names the nearest.
    """
    if name not in tasks:
        nearest = difflib.get_close_matches(str(name), tasks, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"task must be one of {sorted(tasks)}, got {name!r}{hint}")
    return tasks[name]


class BridgeVectorEnv(VectorEnv, abc.ABC):
    """B rows of one task: autoreset, seeds, action checks, rewards and episode ends; subclasses bring the dynamics.

    A row ends by success (held for `SUCCESS_HOLD_STEPS` steps) or failure: `terminated`; by the horizon or by an
    uncertainty above the limit: `truncated`. `info["end_reason"]` says which: "success", "failure", "horizon",
    "uncertainty", or "" while the row runs.

    Step info, each key an array of B with a mask `_key` as Gymnasium has it: `is_success` (the held success), `success`
    and `failure` (of this moment), `reward.<term>`, `uncertainty`, `clipped` (action components out of range in this
    step), `elapsed_steps`, `end_reason`, `initial_state` and `episode_seed`. Reset info: the last two.

    Subclasses implement `_start_rows`, `_advance` and `_observe`.
    """

    def __init__(
        self,
        num_envs: int,
        task: Task,
        single_observation_space: gym.spaces.Dict,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        uncertainty_limit: float = np.inf,
        uncertainty_penalty: float = 0.0,
        reward: str = REWARDS[0],
        num_initial_states: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Set up the bookkeeping.

        Args:
            num_envs: rows B >= 1.
            task: the task of every row.
            single_observation_space: the space of one row's observation.
            autoreset_mode: what happens to finished rows, as Gymnasium defines it.
            max_episode_steps: control steps until truncation; None takes the task's.
            uncertainty_limit: rows whose uncertainty is above it are truncated.
            uncertainty_penalty: reward that a unit of uncertainty costs in every step.
            reward: "terms" or "progress", see `envs.judging.Rules`.
            num_initial_states: initial states are 0 .. this - 1; None takes the task's count.
            render_mode: None or "rgb_array".

        Raises:
            ValueError: num_envs below 1, an unknown mode, or what `envs.judging.Rules` does not admit.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.num_envs = num_envs
        self.task = task
        self.task_description = task.instruction
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": CONTROL_HZ,
            "autoreset_mode": self.autoreset_mode,
        }
        self.render_mode = render_mode
        self.single_observation_space = single_observation_space
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.num_initial_states = len(task.initial_states) if num_initial_states is None else num_initial_states
        steps = task.max_episode_steps if max_episode_steps is None else max_episode_steps
        self.rules = Rules(steps, float(uncertainty_limit), uncertainty_penalty, reward)

        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._started = np.zeros(num_envs, bool)
        self._finished = np.zeros(num_envs, bool)
        self._elapsed = np.zeros(num_envs, np.int64)
        self._held = np.zeros(num_envs, np.int64)
        self._potential = np.zeros(num_envs)
        self._initial_state = np.zeros(num_envs, np.int64)
        self._episode_seed = np.zeros(num_envs, np.int64)

    @abc.abstractmethod
    def _start_rows(self, mask: np.ndarray, seeds: np.ndarray, initial_states: np.ndarray) -> None:
        """Begin a new episode in the rows where `mask` (B,) bool is set and leave every other row bit-identical.

        Args:
            mask: (B,) bool, at least one set.
            seeds: (B,) int64 >= 0, each row's only source of randomness; entries outside the mask mean nothing.
            initial_states: (B,) int64 in 0 .. num_initial_states - 1; entries outside the mask mean nothing.
        """

    @abc.abstractmethod
    def _advance(self, actions: np.ndarray, active: np.ndarray) -> StepResult:
        """Advance one control step.

        Args:
            actions: (B, 7) float32 in physical units (`wfm_core.data.actions`), finite and within the limits.
            active: (B,) bool; the other rows begin a new episode right after, so skip them or not: nobody looks.
        """

    @abc.abstractmethod
    def _observe(self) -> Obs:
        """Return the present observation of all B rows; called once or twice a step, so rendered rows are kept."""

    def _render_frames(self) -> np.ndarray:
        """Return (B, H, W, 3) uint8 frames of the present moment."""
        return self._observe()["pixels"]

    @property
    def _max_episode_steps(self) -> int:
        """What LeRobot asks an env for."""
        return self.rules.max_episode_steps

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """The rows' generators; one never seeded is seeded from the system's entropy."""
        return tuple(self._generator(row) for row in range(self.num_envs))

    @np_random.setter
    def np_random(self, value: Sequence[np.random.Generator]) -> None:  # ty: ignore[incompatible-property-override]  as SyncVectorEnv
        if len(value) != self.num_envs:
            raise ValueError(f"np_random must be {self.num_envs} generators, one a row, got {len(value)}")
        self._generators = list(value)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Obs, dict[str, Any]]:
        """Begin new episodes in all rows, or in those of `options["reset_mask"]`.

        Args:
            seed: None (each row goes on with its generator), an int (row i gets seed + i) or one entry a row.
            options: "initial_state": an int or B ints; without it a row draws its own from its seed.
                "reset_mask": (B,) bool array; the other rows stay as they are. Unknown keys are ignored.

        Returns:
            The observation of all rows and the info of the rows that were reset.

        Raises:
            TypeError: a reset mask that is no bool array.
            ValueError: a wrong number of seeds or initial states, an initial state out of range, an empty mask.
            ResetNeeded: a mask that leaves out rows never started.
        """
        options = options or {}
        mask = checked_reset_mask(options.get("reset_mask"), self.num_envs)
        never = np.flatnonzero(~mask & ~self._started)
        if never.size:
            raise ResetNeeded(f"reset_mask must include rows that were never reset, got none of {never.tolist()}")
        seeds = checked_seeds(seed, self.num_envs)
        chosen = checked_initial_states(options.get("initial_state"), mask, self.num_initial_states)
        for row in np.flatnonzero(mask):
            if seeds[row] is not None:
                self._generators[row], _ = seeding.np_random(seeds[row])
        self._begin(mask, chosen)
        return self._observation(), masked_info(self._episode_info(), mask)

    def step(self, actions: np.ndarray) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every row by one control step (0.2 s).

        Args:
            actions: (B, 7) in [-1, 1]; beyond it they are clipped and counted in `info["clipped"]`.

        Returns:
            Observation, reward (B,) float64, terminated (B,), truncated (B,) and info, as Gymnasium's `VectorEnv.step`.

        Raises:
            ResetNeeded: before the first reset, or, with autoreset DISABLED, on a finished row.
            ValueError: actions of another shape or not finite.
        """
        if not self._started.all():
            raise ResetNeeded("reset() must be called before step()")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._finished.any():
            rows = np.flatnonzero(self._finished).tolist()
            raise ResetNeeded(f"finished rows must be reset with options['reset_mask'] before step(), got rows {rows}")
        restart = self._finished.copy()  # only ever set here in NEXT_STEP mode
        active = ~restart
        physical, clipped = checked_actions(actions, active)
        result = self._advance(physical, active)
        reward, terminated, truncated, info = self._judge(result, clipped, active)
        info = masked_info(info, active)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            if restart.any():
                self._begin(restart)
                info = joined_info(info, masked_info(self._episode_info(), restart))
            self._finished = terminated | truncated
        elif self.autoreset_mode is AutoresetMode.DISABLED:
            self._finished = terminated | truncated
        elif (ended := terminated | truncated).any():
            info = self._same_step_reset(ended, info)
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...]:
        """Return one (H, W, 3) uint8 frame a row."""
        return tuple(np.array(self._render_frames()))

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return, one entry a row, an attribute, or what a method of the batch returns (as `SyncVectorEnv.call`)."""
        value = getattr(self, name)
        return tuple(value(*args, **kwargs)) if callable(value) else (value,) * self.num_envs

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return an attribute, once a row."""
        return self.call(name)

    def _generator(self, row: int) -> np.random.Generator:
        generator = self._generators[row]
        if generator is None:
            generator, _ = seeding.np_random()
            self._generators[row] = generator
        return generator

    def _begin(self, mask: np.ndarray, chosen: np.ndarray | None = None) -> None:
        """Draw seeds and, unless chosen, initial states for the rows in `mask`, and start them."""
        for row in np.flatnonzero(mask):
            # Both are always drawn, so that choosing the state that would be drawn changes nothing else.
            self._initial_state[row] = self._generator(row).integers(self.num_initial_states)
            self._episode_seed[row] = self._generator(row).integers(2**31)
        if chosen is not None:
            self._initial_state[mask] = chosen[mask]
        self._start_rows(mask, self._episode_seed.copy(), self._initial_state.copy())
        for counter in (self._elapsed, self._held, self._finished):
            counter[mask] = 0
        self._started |= mask

    def _judge(
        self, result: StepResult, clipped: np.ndarray, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Turn a step result into reward (B,), terminated (B,), truncated (B,) and info; zeros where not active."""
        self._elapsed[active] += 1
        found = judge(result, self._elapsed, self._held, self._potential, self.rules)
        self._held, self._potential = found.held, found.potential
        terms = {f"reward.{name}": result.reward_terms[:, i].copy() for i, name in enumerate(REWARD_TERMS)}
        info = {
            "is_success": found.solved,
            "success": result.success.copy(),
            "failure": result.failure.copy(),
            **terms,
            "uncertainty": result.uncertainty.copy(),
            "clipped": clipped,
            "elapsed_steps": self._elapsed.copy(),
            "end_reason": found.end_reason,
            **self._episode_info(),
        }
        reward = np.where(active, found.reward, 0.0)
        return reward, found.terminated & active, found.truncated & active, info

    def _same_step_reset(self, ended: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
        """Restart the ended rows, keeping their last observation and info under "final_obs" and "final_info"."""
        last = self._observation()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            final_obs[row] = {key: value[row].copy() for key, value in last.items()}
        final_info = masked_info({key: value for key, value in info.items() if not key.startswith("_")}, ended)
        self._begin(ended)
        running = masked_info({key: value for key, value in info.items() if not key.startswith("_")}, ~ended)
        info = joined_info(running, masked_info(self._episode_info(), ended))
        return {
            **info,
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "final_info": final_info,
            "_final_info": ended.copy(),
        }

    def _observation(self) -> Obs:
        """Return `_observe()` in fresh memory and inside the space."""
        obs = {key: np.array(value) for key, value in self._observe().items()}
        obs["agent_pos"] = np.clip(obs["agent_pos"].astype(np.float32), AGENT_POS_LOW, AGENT_POS_HIGH)
        return obs

    def _episode_info(self) -> dict[str, np.ndarray]:
        return {"initial_state": self._initial_state.copy(), "episode_seed": self._episode_seed.copy()}


class BridgeEnv(gym.Env):
    """One row of a `BridgeVectorEnv` as a plain Gymnasium env."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(self, vector_env: BridgeVectorEnv) -> None:
        """Wrap a vector env of one row whose autoreset is DISABLED.

        Raises:
            ValueError: more than one row, or another autoreset mode.
        """
        if vector_env.num_envs != 1 or vector_env.autoreset_mode is not AutoresetMode.DISABLED:
            raise ValueError(
                "vector_env must have one row and autoreset DISABLED, "
                f"got {vector_env.num_envs} rows and {vector_env.autoreset_mode.name}"
            )
        self.vector_env = vector_env
        self.render_mode = vector_env.render_mode
        self.observation_space = vector_env.single_observation_space
        self.action_space = vector_env.single_action_space

    @property
    def task_description(self) -> str:
        """The language instruction."""
        return self.vector_env.task_description

    @property
    def task(self) -> Task:
        """The task."""
        return self.vector_env.task

    @property
    def _max_episode_steps(self) -> int:
        return self.vector_env._max_episode_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        """Begin a new episode; see `BridgeVectorEnv.reset` for the options and errors."""
        super().reset(seed=seed)
        self.vector_env.np_random = (self.np_random,)
        obs, info = self.vector_env.reset(options=options)
        return first_row(obs), first_row_info(info)

    def step(self, action: np.ndarray) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        """Advance one control step (0.2 s) with an action (7,) in [-1, 1].

        Raises:
            ResetNeeded: before the first reset or after the end of the episode.
            ValueError: an action of another shape or not finite.
        """
        action = np.asarray(action)
        if action.shape != (ACTION_DIM,):
            raise ValueError(f"action must have shape ({ACTION_DIM},), got {action.shape}")
        obs, reward, terminated, truncated, info = self.vector_env.step(action[None])
        return first_row(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), first_row_info(info)

    def render(self) -> np.ndarray:
        """Return the present frame, (H, W, 3) uint8."""
        return self.vector_env.render()[0]

    def close(self) -> None:
        """Close the vector env; closing twice is fine."""
        self.vector_env.close()
