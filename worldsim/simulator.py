"""The simulator: a world model and its heads, stepped as one pure function over batched states."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wfm_core.checkpoint import DECODERS, find_checkpoint, load_world_model, read_config
from wfm_core.data.actions import ACTION_DIM, ACTION_LOW, AGENT_POS_DIM
from wfm_core.memory import keep_freed_memory
from wfm_core.models.scripted import ScriptedWorldModel
from wfm_core.packing import frozen, pack_linears
from wfm_core.precision import compute_dtype
from wfm_core.world_model import Reference, WorldModel, no_motion
from worldsim.heads import HeadsOutput, load_heads
from worldsim.scripted_heads import ScriptedHeads
from worldsim.state import SimState

_log = logging.getLogger(__name__)

# Where a source has no proprioception: gripper pointing down and open, over the middle of a Bridge table.
NEUTRAL_AGENT_POS = (0.30, 0.0, 0.12, 0.0, 0.0, 0.0, 1.0)
CPU_CHUNK_ROWS = {False: 16, True: 64}
"""On a CPU larger batches are stepped in chunks, by whether the step is compiled: activations then stay in the cache,
of which a compiled step has fewer."""


class HeadsLike(Protocol):
    """What the simulator asks of heads."""

    def instruction_id(self, instruction: str) -> int:
        """Return the number of an instruction; ValueError if unknown."""
        ...

    def read(
        self, latents: Tensor, agent_pos: Tensor, actions: Tensor, instruction_id: Tensor, reference: Tensor
    ) -> HeadsOutput:
        """Judge control steps.

        Args:
            latents: (B, 2, h, w, C), the previous and the present frame's.
            agent_pos: (B, 7), at the previous frame.
            actions: (B, 2, 7), physical units, that which led to the previous frame and that between the two.
            instruction_id: (B,) int64.
            reference: (B, h, w, C), the last real frame's.
        """
        ...


@dataclass(frozen=True)
class Calibration:
    """Where probabilities become decisions; stored in a checkpoint's config.json under "calibration".

    Attributes:
        success_threshold: a success probability at or above it counts.
        failure_threshold: a failure probability at or above it counts.
        uncertainty_limit: predictions above it are not to be trusted.
        success_thresholds: by instruction, where another one than `success_threshold` is fair.
    """

    success_threshold: float = 0.5
    failure_threshold: float = 0.5
    uncertainty_limit: float = math.inf
    success_thresholds: Mapping[str, float] = field(default_factory=dict)

    def success_threshold_for(self, instruction: str) -> float:
        """Return the success threshold of an instruction."""
        return self.success_thresholds.get(instruction, self.success_threshold)


@dataclass(frozen=True)
class SimStep:
    """What one control step gave, B rows.

    Attributes:
        reward_terms: (B, 4) in [0, 1], in the order of `tasks.REWARD_TERMS`.
        success: (B,) probability.
        failure: (B,) probability.
        agent_pos: (B, 7), m, rad, openness.
        uncertainty: (B,) >= 0.
        latents: (B, h, w, C) of the new frame.
    """

    reward_terms: Tensor
    success: Tensor
    failure: Tensor
    agent_pos: Tensor
    uncertainty: Tensor
    latents: Tensor


class WorldSim:
    """A world model with heads. Holds no state: `start` makes one and `step` maps it to the next."""

    def __init__(
        self,
        world_model: WorldModel,
        heads: HeadsLike,
        *,
        calibration: Calibration | None = None,
        name: str = "",
        device: str | torch.device = "cpu",
        chunk_rows: int | None = None,
        compiled: bool = False,
    ) -> None:
        """Put the two together.

        Args:
            world_model: any family; already on `device`.
            heads: already on `device`.
            calibration: thresholds; None takes the defaults.
            name: what to call it in reports.
            device: where states live.
            chunk_rows: step at most so many rows at once; None takes `CPU_CHUNK_ROWS` on a CPU and all elsewhere.
            compiled: compile the step. The first one of each number of rows then takes a minute or two, the others
                about half the time; needs a C++ compiler on a CPU.

        Raises:
            ValueError: chunk_rows below 1.
        """
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        self.world_model = world_model
        self.heads = heads
        self.calibration = calibration or Calibration()
        self.name = name
        self.device = torch.device(device)
        self.chunk_rows = chunk_rows or (CPU_CHUNK_ROWS[compiled] if self.device.type == "cpu" else None)
        self._step_rows = frozen(self._predict, self.device) if compiled else self._predict

    def start(
        self,
        frames: np.ndarray | Tensor,
        agent_pos: np.ndarray | Tensor | None,
        actions: np.ndarray | Tensor,
        instruction: str | Sequence[str],
        seeds: Sequence[int],
    ) -> SimState:
        """Begin at the last of T >= 1 context frames.

        Args:
            frames: (B, T, H, W, 3) uint8.
            agent_pos: (B, T, 7), or None: it is then estimated by the heads from a neutral pose.
            actions: (B, T - 1, 7) physical actions between the frames.
            instruction: one for all rows, or one a row.
            seeds: B ints >= 0; a row's future depends on its own seed only.

        Raises:
            ValueError: a wrong shape or type, or an instruction the heads do not know.
        """
        self._check_frames(frames)
        frames = torch.as_tensor(frames)
        return self.start_from(frames, self.encode(frames), agent_pos, actions, instruction, seeds)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode uint8 frames (B, T, H, W, 3) to latents (B, T, h, w, C) on the simulator's device."""
        rows = len(frames)
        return torch.cat(self._in_chunks(lambda chunk: self.world_model.encode(frames[chunk].to(self.device)), rows))

    def start_from(
        self,
        frames: Tensor,
        latents: Tensor,
        agent_pos: np.ndarray | Tensor | None,
        actions: np.ndarray | Tensor,
        instruction: str | Sequence[str],
        seeds: Sequence[int],
    ) -> SimState:
        """Begin at the last of T >= 1 context frames whose latents (B, T, h, w, C) are known; see `start`.

        Args:
            frames: (B, T, H, W, 3) uint8, or only the last ones, (B, 1, H, W, 3).
            latents: (B, T, h, w, C), from `encode`.
            agent_pos: as for `start`.
            actions: as for `start`.
            instruction: as for `start`.
            seeds: as for `start`.
        """
        rows, steps = latents.shape[:2]
        actions = torch.as_tensor(actions)
        if actions.shape != (rows, steps - 1, ACTION_DIM):
            raise ValueError(f"actions must have shape ({rows}, {steps - 1}, {ACTION_DIM}), got {tuple(actions.shape)}")
        if agent_pos is not None and tuple(agent_pos.shape) != (rows, steps, AGENT_POS_DIM):
            raise ValueError(
                f"agent_pos must have shape ({rows}, {steps}, {AGENT_POS_DIM}), got {tuple(agent_pos.shape)}"
            )
        if len(seeds) != rows:
            raise ValueError(f"seeds must have one entry for each of {rows} rows, got {len(seeds)}")
        texts = [instruction] * rows if isinstance(instruction, str) else list(instruction)
        if len(texts) != rows:
            raise ValueError(f"instruction must be one text or {rows}, got {len(texts)}")
        ids = torch.tensor([self.heads.instruction_id(text) for text in texts], device=self.device)
        actions = actions.to(self.device, torch.float32)

        def start_rows(chunk: slice) -> SimState:
            context = latents[chunk].to(self.device)
            if agent_pos is None:
                pose = self._estimated_agent_pos(context, actions[chunk], ids[chunk])
            else:
                pose = torch.as_tensor(agent_pos)[chunk, -1].to(self.device, torch.float32)
            model = self.world_model.start(context, actions[chunk], list(seeds[chunk]), texts[chunk])
            elapsed = torch.zeros(len(context), dtype=torch.int64, device=self.device)
            present = context[:, -1].contiguous()
            reference = frames[chunk, -1].to(self.device)
            before = actions[chunk, -1] if steps > 1 else no_motion(pose)
            return SimState(model, present, pose, before, ids[chunk], elapsed, reference, present)

        return SimState.concatenate(self._in_chunks(start_rows, rows))

    def step(self, state: SimState, action: Tensor) -> tuple[SimState, SimStep]:
        """Advance one control step.

        Args:
            state: B rows; left unchanged.
            action: (B, 7) float32, physical units.

        Returns:
            The next state and what the step gave.

        Raises:
            ValueError: an action of another shape.
        """
        if action.shape != (state.num_rows, ACTION_DIM):
            raise ValueError(f"action must have shape ({state.num_rows}, {ACTION_DIM}), got {tuple(action.shape)}")
        action = action.to(self.device)
        if self.chunk_rows is None or state.num_rows <= self.chunk_rows:
            return self._step_rows(state, action)
        parts = self._in_chunks(lambda chunk: self._step_rows(state.take(chunk), action[chunk]), state.num_rows)
        steps = [step for _, step in parts]
        joined = {field.name: torch.cat([getattr(step, field.name) for step in steps]) for field in fields(SimStep)}
        return SimState.concatenate([state for state, _ in parts]), SimStep(**joined)

    def decode(self, latents: Tensor, reference: Reference) -> Tensor:
        """Decode latents (B, h, w, C) to uint8 frames (B, H, W, 3), given the rows' `SimState.reference`."""
        parts = self._in_chunks(
            lambda chunk: self.world_model.decode(latents[chunk], reference.take(chunk)), len(latents)
        )
        return torch.cat(parts)

    def _predict(self, state: SimState, action: Tensor) -> tuple[SimState, SimStep]:
        model, latents, uncertainty = self.world_model.step(state.model, action)
        pair = torch.stack([state.latents, latents], dim=1)  # (B, 2, h, w, C)
        actions = torch.stack([state.previous_action, action], dim=1)
        out = self.heads.read(pair, state.agent_pos, actions, state.instruction_id, state.reference_latents)
        step = SimStep(out.reward_terms, out.success, out.failure, out.agent_pos, uncertainty, latents)
        after = replace(
            state,
            model=model,
            latents=latents,
            agent_pos=out.agent_pos,
            previous_action=action.clone(),  # the caller may write its next action into the same memory
            elapsed=state.elapsed + 1,
        )
        return after, step

    def _in_chunks[Part](self, run: Callable[[slice], Part], rows: int) -> list[Part]:
        """Run on near-equal chunks: a remainder of one or two rows would get other kernels, so other round-off."""
        count = math.ceil(rows / (self.chunk_rows or rows))
        ends = [rows * (i + 1) // count for i in range(count)]
        return [run(slice(first, end)) for first, end in zip([0, *ends], ends, strict=False)]

    def _estimated_agent_pos(self, latents: Tensor, actions: Tensor, ids: Tensor) -> Tensor:
        """Let the heads follow the context (B, T, h, w, C) from the neutral pose: (B, 7)."""
        pose = torch.tensor(NEUTRAL_AGENT_POS, device=latents.device).repeat(len(latents), 1)
        stay = no_motion(pose)[:, None]
        # A first look at the first frame without motion, then the recorded motion.
        first, latents = latents[:, 0], torch.cat([latents[:, :1], latents], dim=1)
        actions = torch.cat([stay, stay, actions], dim=1)
        for t in range(latents.shape[1] - 1):
            pose = self.heads.read(latents[:, t : t + 2], pose, actions[:, t : t + 2], ids, first).agent_pos
        return pose

    def _check_frames(self, frames: np.ndarray | Tensor) -> None:
        shape, dtype = self.world_model.frame_shape, str(frames.dtype).removeprefix("torch.")
        if frames.ndim != 5 or tuple(frames.shape[2:]) != shape or dtype != "uint8" or not frames.shape[1]:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"frames must be uint8 (B, T, {sizes}) with T >= 1, got {dtype} {tuple(frames.shape)}")


def scripted_world_sim() -> WorldSim:
    """Return the simulator with known answers (`x' = x + a`), for tests and for trying the API without weights."""
    return WorldSim(ScriptedWorldModel(), ScriptedHeads(), calibration=Calibration(0.5, 0.5, 0.2), name="scripted")


def load_world_sim(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    compiled: bool = False,
    packed: bool | None = None,
    decoder: str = DECODERS[0],
) -> WorldSim:
    """Load a checkpoint by shipped name or folder; "scripted" needs none.

    On a CPU the process keeps the memory that it frees from now on; see `wfm_core.memory`.

    Args:
        name_or_path: a shipped name, or a folder with config.json, model weights and heads.safetensors.
        device: where to run.
        dtype: of weights and activations; None chooses bfloat16 where it is fast, else float32.
        compiled: see `WorldSim`.
        packed: see `wfm_core.packing`; None packs unless compiled, which lays weights out itself.
        decoder: what draws pixels; see `load_world_model`.

    Raises:
        ValueError: no such checkpoint, or a damaged one; names the file.
    """
    if str(name_or_path) == "scripted":
        return scripted_world_sim()
    folder = find_checkpoint(name_or_path)
    _require_bridge_actions(folder)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    heads = load_heads(folder).requires_grad_(False).to(device)
    heads.compute_in(dtype or compute_dtype(torch.device(device)))
    packed = not compiled if packed is None else packed
    if packed:
        pack_linears(heads)
    return WorldSim(
        load_world_model(folder, device=device, dtype=dtype, packed=packed, decoder=decoder),
        heads,
        calibration=read_calibration(folder),
        name=folder.name,
        device=device,
        compiled=compiled,
    )


def _require_bridge_actions(folder: Path) -> None:
    config = read_config(folder)
    if config.get("action_free", False):
        raise ValueError(
            f"{folder} has learnt from frames alone, nobody can act in it; teach it actions with worldsim-posttrain"
        )
    bounds = config.get("dynamics", {}).get("actions", {}).get("low", ACTION_LOW)
    if len(bounds) != ACTION_DIM:
        raise ValueError(
            f"an environment takes Bridge's {ACTION_DIM} action dimensions, got {len(bounds)} of another robot in "
            f"{folder}; use it through wfm_core.checkpoint.load_world_model"
        )


def read_calibration(folder: Path) -> Calibration:
    """Read "calibration" from a checkpoint's config.json; the defaults (and a warning) if it was never calibrated.

    Raises:
        ValueError: the file is damaged, or a key is unknown or no number; names the file.
    """
    entry = read_config(folder).get("calibration")
    if entry is None:
        _log.warning("%s was never calibrated: thresholds are 0.5 and no uncertainty is too large", folder)
        return Calibration()
    try:
        values = dict(entry)
        by_instruction = {text: float(value) for text, value in values.pop("success_thresholds", {}).items()}
        return Calibration(**{name: float(value) for name, value in values.items()}, success_thresholds=by_instruction)
    except (TypeError, ValueError, AttributeError) as error:
        names = [setting.name for setting in fields(Calibration)]
        raise ValueError(f"{folder}/config.json: calibration must map {names} to numbers, got {entry!r}") from error
