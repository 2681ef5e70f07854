"""The success head as a judge of videos, whatever world they come from."""

import numpy as np
import torch

from tasks import SUCCESS_HOLD_STEPS, held
from wfm_core.world_model import no_motion
from worldsim.evaluate import Trace
from worldsim.simulator import WorldSim


@torch.no_grad()
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
    device = sim.device
    latents = sim.world_model.encode(torch.from_numpy(trace.frames[None]).to(device))[0]  # (T + 1, h, w, C)
    pairs = torch.stack([latents[:-1], latents[1:]], dim=1)  # (T, 2, h, w, C)
    agent_pos = torch.from_numpy(trace.agent_pos[:-1]).to(device)
    actions = torch.from_numpy(trace.actions).to(device)
    actions = torch.stack([torch.cat([no_motion(agent_pos[:1]), actions[:-1]]), actions], dim=1)  # (T, 2, 7)
    ids = torch.full((len(pairs),), sim.heads.instruction_id(instruction), dtype=torch.int64, device=device)
    success = sim.heads.read(pairs, agent_pos, actions, ids).success.cpu().numpy()
    seen = success >= sim.calibration.success_threshold_for(instruction)
    return held(np.concatenate([seen, np.repeat(seen[-1:], SUCCESS_HOLD_STEPS - 1)]))
