"""`MujocoBridge-v0`: the ground-truth twin as a Gymnasium env and vector env."""

from collections.abc import Iterable

import numpy as np
from gymnasium.vector import AutoresetMode

from envs.judging import REWARDS, StepResult
from envs.mujoco_factors import Factors
from envs.mujoco_twin import IMAGE_SIZE, MujocoBridge, Stage
from envs.spaces import pixels_observation_space
from envs.vector import BridgeEnv, BridgeVectorEnv, Obs, find_task
from tasks.layout import jitter_initial_state
from tasks.task import REWARD_TERMS
from wfm_core.data.actions import AGENT_POS_DIM

__all__ = ["Factors", "MujocoBridge", "MujocoBridgeEnv", "MujocoBridgeVectorEnv", "Stage"]


class MujocoBridgeVectorEnv(BridgeVectorEnv):
    """B episodes of one task in the twin, stepped one after the other in this process by one model and renderer."""

    def __init__(
        self,
        num_envs: int = 1,
        task: str = "put_carrot_on_plate",
        *,
        jitter: float = 0.0,
        factors: Factors | Iterable[str] = (),
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        reward: str = REWARDS[0],
        render_mode: str | None = None,
    ) -> None:
        """Compile the scene.

        Args:
            num_envs: rows B >= 1.
            task: a name in `tasks.TASKS`.
            jitter: standard deviation (m) of the objects' places about the initial state, drawn from the row's seed.
            factors: which factors of variation are drawn at reset, as names or as `Factors`.
            autoreset_mode: what happens to finished rows, as Gymnasium defines it.
            max_episode_steps: control steps until truncation; None takes the task's.
            reward: "terms" or "progress", see `envs.judging.Rules`.
            render_mode: None or "rgb_array".

        Raises:
            ValueError: unknown task or factor, or an argument out of range.
        """
        super().__init__(
            num_envs,
            find_task(task),
            pixels_observation_space((IMAGE_SIZE, IMAGE_SIZE, 3)),
            autoreset_mode=autoreset_mode,
            max_episode_steps=max_episode_steps,
            reward=reward,
            render_mode=render_mode,
        )
        if not (np.isfinite(jitter) and jitter >= 0):
            raise ValueError(f"jitter must be a finite number of metres >= 0, got {jitter}")
        self.jitter = float(jitter)
        self._stage = Stage(self.task, factors if isinstance(factors, Factors) else Factors.of(factors))
        self.twins = [MujocoBridge(self.task, stage=self._stage) for _ in range(num_envs)]
        self._pixels = np.zeros((num_envs, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self._agent_pos = np.zeros((num_envs, AGENT_POS_DIM), np.float32)
        self._stale = np.zeros(num_envs, bool)

    def _start_rows(self, mask: np.ndarray, seeds: np.ndarray, initial_states: np.ndarray) -> None:
        for row in np.flatnonzero(mask):
            rng = np.random.default_rng(int(seeds[row]))
            layout = jitter_initial_state(self.task.initial_states[initial_states[row]], rng, self.jitter)
            self.twins[row].reset(layout, rng)
        self._stale |= mask

    def _advance(self, actions: np.ndarray, active: np.ndarray) -> StepResult:
        terms = np.zeros((self.num_envs, len(REWARD_TERMS)), np.float32)
        success, failure = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        for row in np.flatnonzero(active):
            self.twins[row].step(actions[row])
            state = self.twins[row].task_state()
            named = self.task.reward_terms(state)
            terms[row] = [named[term] for term in REWARD_TERMS]
            success[row], failure[row] = self.task.success(state), self.task.failure(state)
        self._stale |= active
        return StepResult(terms, success, failure, np.zeros(self.num_envs, np.float32))

    def _observe(self) -> Obs:
        for row in np.flatnonzero(self._stale):
            self._pixels[row] = self.twins[row].render()
            self._agent_pos[row] = self.twins[row].agent_pos()
        self._stale[:] = False
        return {"pixels": self._pixels, "agent_pos": self._agent_pos}

    def close_extras(self, **kwargs: object) -> None:
        """Free the renderer."""
        self._stage.close()


class MujocoBridgeEnv(BridgeEnv):
    """One episode at a time in the twin."""

    def __init__(
        self,
        task: str = "put_carrot_on_plate",
        *,
        jitter: float = 0.0,
        factors: Factors | Iterable[str] = (),
        max_episode_steps: int | None = None,
        reward: str = REWARDS[0],
        render_mode: str | None = None,
    ) -> None:
        """Compile the scene; see `MujocoBridgeVectorEnv` for the arguments and errors."""
        super().__init__(
            MujocoBridgeVectorEnv(
                1,
                task,
                jitter=jitter,
                factors=factors,
                autoreset_mode=AutoresetMode.DISABLED,
                max_episode_steps=max_episode_steps,
                reward=reward,
                render_mode=render_mode,
            )
        )
