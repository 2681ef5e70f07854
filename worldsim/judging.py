"""The success head as a judge of videos, whatever world they come from."""

import numpy as np
import torch

from tasks import SUCCESS_HOLD_STEPS, held
from wfm_core.world_model import no_motion
from worldsim.evaluate import Trace
from worldsim.simulator import WorldSim


def judge(sim: WorldSim, trace: Trace, instruction: str) -> bool:
    """Let the success head watch an episode.

    An episode ends as soon as the world that ran it has seen success for `SUCCESS_HOLD_STEPS` steps. A head that saw it
    a step later would be cut off, so the last frame counts as if it stayed.

    Args:
        sim: world model and heads.
        trace: T >= 1 steps of frames, proprioception and actions, from any world.
        instruction: what was to be done.

    Returns:
        Whether it sees success for `SUCCESS_HOLD_STEPS` steps in a row.

    Raises:
        ValueError: the heads do not know the instruction.
    """
    success = success_probability(sim, trace.frames, trace.agent_pos, trace.actions, instruction)[1:]
    seen = success >= sim.calibration.success_threshold_for(instruction)
    return held(np.concatenate([seen, np.repeat(seen[-1:], SUCCESS_HOLD_STEPS - 1)]))


@torch.no_grad()
def success_probability(
    sim: WorldSim, frames: np.ndarray, agent_pos: np.ndarray, actions: np.ndarray, instruction: str
) -> np.ndarray:
    """Let the success head say of every frame how surely the task is done in it.

    Args:
        sim: world model and heads.
        frames: (T + 1, H, W, 3) uint8, of the model's size, T >= 1.
        agent_pos: (T + 1, 7).
        actions: (T, 7) physical.
        instruction: what was to be done.

    Returns:
        (T + 1,) float32, 0 in the first frame, which says nothing by itself.

    Raises:
        ValueError: the heads do not know the instruction.
    """
    device = sim.device
    latents = sim.world_model.encode(torch.from_numpy(frames[None]).to(device))[0]  # (T + 1, h, w, C)
    pairs = torch.stack([latents[:-1], latents[1:]], dim=1)  # (T, 2, h, w, C)
    pose, told = torch.from_numpy(agent_pos[:-1]).to(device), torch.from_numpy(actions).to(device)
    told = torch.stack([torch.cat([no_motion(pose[:1]), told[:-1]]), told], dim=1)  # (T, 2, 7)
    ids = torch.full((len(pairs),), sim.heads.instruction_id(instruction), dtype=torch.int64, device=device)
    success = sim.heads.read(pairs, pose, told, ids, latents[:1].expand_as(latents[1:])).success.cpu().numpy()
    return np.concatenate([[0], success]).astype(np.float32)
