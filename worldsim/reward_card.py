"""How far the world model's judgement can be trusted: on true videos, and on policies that should fail."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tasks.task import SUCCESS_HOLD_STEPS
from worldsim.evaluate import EpisodeRecord, Trace
from worldsim.leaderboard import IMAGINED, TWIN, confusion, success_rate
from worldsim.simulator import WorldSim


@torch.no_grad()
def judge(sim: WorldSim, trace: Trace, instruction: str) -> bool:
    """Let the success head watch an episode.

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
    ids = torch.full((len(pairs),), sim.heads.instruction_id(instruction), dtype=torch.int64, device=device)
    success = sim.heads.read(pairs, agent_pos, actions, ids).success.cpu().numpy()
    held = 0
    for moment in success >= sim.calibration.success_threshold:
        held = held + 1 if moment else 0
        if held == SUCCESS_HOLD_STEPS:
            return True
    return False


def head_on_truth(judged: Sequence[tuple[bool, bool]]) -> dict[str, Any] | None:
    """Return the confusion matrix of (head's verdict, true success) pairs, or None without one."""
    if not judged:
        return None
    verdicts, truths = np.array(judged, dtype=bool).T
    return confusion(predicted=verdicts, truth=truths)


def false_success(records: Sequence[EpisodeRecord], probes: Sequence[str]) -> dict[str, Any]:
    """Return how often imagination calls a success what is none, for each probe policy and for all.

    Args:
        records: episodes of the probes, imagined and, if there is a twin, true. Without twin no probe is taken to
            succeed.
        probes: their names.

    Returns:
        name (and "all") -> false success rate with its Wilson interval, over the episodes that truly fail.
    """
    true_success = {(r.policy, r.task, *r.pair): r.success for r in records if r.world == TWIN}
    card: dict[str, Any] = {}
    verdicts: list[bool] = []
    for probe in probes:
        own = [
            record.success
            for record in records
            if record.world == IMAGINED
            and record.policy == probe
            and not true_success.get((record.policy, record.task, *record.pair), False)
        ]
        card[probe] = success_rate(sum(own), len(own))
        verdicts += own
    card["all"] = success_rate(sum(verdicts), len(verdicts))
    return card
