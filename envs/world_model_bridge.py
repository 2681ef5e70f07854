"""`WorldModel-Bridge-v0`: the Bridge set-up imagined by a world model."""

from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from envs.contexts import Context, episode_context, read_episode, shipped_context
from envs.judging import REWARDS, StepResult
from envs.spaces import latents_observation_space, pixels_observation_space
from envs.vector import BridgeEnv, BridgeVectorEnv, Obs, find_task
from tasks.task import Task
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import DECODERS
from wfm_core.data.episode import Episode
from worldsim.simulator import SimStep, WorldSim, load_world_sim
from worldsim.state import SimState

OBSERVATIONS = ("pixels", "latents")


class WorldModelBridgeVectorEnv(BridgeVectorEnv):
    """B imagined rows, one forward pass for all of them.

    Actions, rewards and episode ends are those of `MujocoBridge-v0`, except that reward terms, success, failure and
    `agent_pos` are read by learned heads, and that a row whose uncertainty exceeds the limit is truncated. The first
    observation is the true context frame, all later ones are imagined. With observation="latents" no pixel is decoded
    unless `render` is called.
    """

    def __init__(
        self,
        num_envs: int = 1,
        world_model: str | Path | WorldSim = DEFAULT_WORLD_MODEL,
        task: str = "put_carrot_on_plate",
        *,
        initial_context: Context | Episode | str | Path | None = None,
        context_frames: int = 1,
        observation: str = "pixels",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        uncertainty_limit: float | None = None,
        uncertainty_penalty: float = 0.0,
        reward: str = REWARDS[0],
        render_mode: str | None = None,
        device: str = "cpu",
        decoder: str = DECODERS[0],
    ) -> None:
        """Load the world model and the contexts.

        Args:
            num_envs: rows B.
            world_model: a shipped checkpoint's name, a checkpoint folder, or a loaded simulator.
            task: a name in `tasks.TASKS`; it gives the instruction, the horizon and the initial states.
            initial_context: an episode, or "<data set folder>#<episode number>", whose beginning every row starts
                from (initial state 0); or a `Context`, for instance from anywhere in recordings
                (`envs.contexts.recorded_context`). None starts from the twin's frames of the task's initial states.
            context_frames: how many of the episode's frames the model sees before the first action.
            observation: "pixels" or "latents".
            autoreset_mode: as Gymnasium defines it.
            max_episode_steps: None takes the task's.
            uncertainty_limit: None takes the checkpoint's calibrated limit; infinity never truncates.
            uncertainty_penalty: reward that a unit of uncertainty costs in every step.
            reward: "terms" or "progress", see `envs.judging.Rules`.
            render_mode: None or "rgb_array".
            device: where a checkpoint is loaded to.
            decoder: what draws a checkpoint's pixels, "tokenizer" or, where it has one, "diffusion".

        Raises:
            ValueError: an unknown task, checkpoint or observation, a damaged file, or too long a context.
        """
        found = find_task(task)
        if observation not in OBSERVATIONS:
            raise ValueError(f"observation must be one of {OBSERVATIONS}, got {observation!r}")
        self.sim = (
            world_model if isinstance(world_model, WorldSim) else load_world_sim(world_model, device, decoder=decoder)
        )
        self.sim.heads.instruction_id(found.instruction)  # heads that cannot judge the task say so now
        self._context = self._make_context(initial_context, context_frames, found)
        self._context_latents: torch.Tensor | None = None
        model = self.sim.world_model
        limit = self.sim.calibration.uncertainty_limit if uncertainty_limit is None else uncertainty_limit
        super().__init__(
            num_envs,
            found,
            latents_observation_space(model.latent_shape)
            if observation == "latents"
            else pixels_observation_space(model.frame_shape),
            autoreset_mode=autoreset_mode,
            max_episode_steps=max_episode_steps,
            uncertainty_limit=limit,
            uncertainty_penalty=uncertainty_penalty,
            reward=reward,
            num_initial_states=len(self._context.frames),
            render_mode=render_mode,
        )
        self.observes_pixels = observation == "pixels"
        self._state: SimState | None = None
        # Frames are decoded when somebody looks; `_stale` rows were not since they last changed.
        self._frames = np.zeros((num_envs, *model.frame_shape), np.uint8)
        self._stale = np.zeros(num_envs, bool)

    @property
    def state(self) -> SimState:
        """The rows' present state, a value to branch from (`WorldSim.step`).

        Raises:
            ValueError: before the first reset.
        """
        if self._state is None:
            raise ValueError("the env must be reset before it has a state")
        return self._state

    def _make_context(self, source: Context | Episode | str | Path | None, num_frames: int, task: Task) -> Context:
        frame_shape = self.sim.world_model.frame_shape
        if isinstance(source, Context):
            return source
        if source is not None:
            episode = source if isinstance(source, Episode) else read_episode(source)
            return episode_context(episode, num_frames, frame_shape)
        if num_frames != 1:
            raise ValueError(f"context_frames must be 1 without an initial_context, got {num_frames}")
        return shipped_context(task, frame_shape)

    @torch.no_grad()
    def start(self, initial_states: np.ndarray, seeds: np.ndarray) -> SimState:
        """Return the state in which rows begin, whatever the rows of this env do.

        Args:
            initial_states: (N,) int64 in 0 .. num_initial_states - 1.
            seeds: (N,) int64 >= 0.
        """
        if self._context_latents is None:  # all at once, so that a row's start does not depend on who starts with it
            self._context_latents = self.sim.encode(torch.from_numpy(self._context.frames))
        return self.sim.start_from(
            torch.from_numpy(self._context.frames[initial_states, -1:]),
            self._context_latents[torch.from_numpy(initial_states).to(self.sim.device)],
            None if self._context.agent_pos is None else self._context.agent_pos[initial_states],
            self._context.actions[initial_states],
            self.task_description,
            seeds.tolist(),
        )

    def result(self, step: SimStep) -> StepResult:
        """Turn what the heads say into decisions."""
        calibration = self.sim.calibration
        return StepResult(
            reward_terms=step.reward_terms.float().cpu().numpy(),
            success=(step.success >= calibration.success_threshold_for(self.task_description)).cpu().numpy(),
            failure=(step.failure >= calibration.failure_threshold).cpu().numpy(),
            uncertainty=step.uncertainty.float().cpu().numpy(),
        )

    @torch.no_grad()
    def _start_rows(self, mask: np.ndarray, seeds: np.ndarray, initial_states: np.ndarray) -> None:
        rows, states = np.flatnonzero(mask), initial_states[mask]
        new = self.start(states, seeds[rows])
        whole = self._state is None or mask.all()
        self._state = new if whole else self.state.put(torch.from_numpy(rows).to(self.sim.device), new)
        self._frames[rows] = self._context.frames[states, -1]
        self._stale[rows] = False

    @torch.no_grad()
    def _advance(self, actions: np.ndarray, active: np.ndarray) -> StepResult:
        self._state, step = self.sim.step(self.state, torch.from_numpy(actions))
        self._stale[:] = True
        return self.result(step)

    def _observe(self) -> Obs:
        agent_pos = self.state.agent_pos.float().cpu().numpy()
        if self.observes_pixels:
            return {"pixels": self._render_frames(), "agent_pos": agent_pos}
        return {"latents": self.state.latents.float().cpu().numpy(), "agent_pos": agent_pos}

    @torch.no_grad()
    def _render_frames(self) -> np.ndarray:
        rows = np.flatnonzero(self._stale)
        if rows.size:
            index = torch.from_numpy(rows).to(self.sim.device)
            frames = self.sim.decode(self.state.latents[index], self.state.reference.take(index))
            self._frames[rows] = frames.cpu().numpy()
            self._stale[:] = False
        return self._frames


class WorldModelBridgeEnv(BridgeEnv):
    """One imagined row; see `WorldModelBridgeVectorEnv`."""

    def __init__(
        self,
        world_model: str | Path | WorldSim = DEFAULT_WORLD_MODEL,
        task: str = "put_carrot_on_plate",
        *,
        initial_context: Context | Episode | str | Path | None = None,
        context_frames: int = 1,
        observation: str = "pixels",
        max_episode_steps: int | None = None,
        uncertainty_limit: float | None = None,
        uncertainty_penalty: float = 0.0,
        reward: str = REWARDS[0],
        render_mode: str | None = None,
        device: str = "cpu",
        decoder: str = DECODERS[0],
    ) -> None:
        """Make a vector env of one row; arguments and errors as there."""
        super().__init__(
            WorldModelBridgeVectorEnv(
                1,
                world_model,
                task,
                initial_context=initial_context,
                context_frames=context_frames,
                observation=observation,
                autoreset_mode=AutoresetMode.DISABLED,
                max_episode_steps=max_episode_steps,
                uncertainty_limit=uncertainty_limit,
                uncertainty_penalty=uncertainty_penalty,
                reward=reward,
                render_mode=render_mode,
                device=device,
                decoder=decoder,
            )
        )
