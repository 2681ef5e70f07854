"""Heads with known answers for `wfm_core.models.scripted`: bring the point to the goal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.task import REWARD_TERMS
from worldsim.heads import HeadsOutput


@dataclass(frozen=True)
class ScriptedHeads:
    """Success within `tolerance` of `goal`, failure beyond `failure_radius` of the origin (all m).

    Reward terms: reach = 1 at the goal falling to 0 at `failure_radius` from it, success 0 or 1, the others 0.
    `agent_pos` follows the action exactly.
    """

    goal: tuple[float, float, float] = (0.2, 0.0, 0.0)
    tolerance: float = 0.02
    failure_radius: float = 0.5

    def instruction_id(self, instruction: str) -> int:
        """Any instruction means the same: 0."""
        return 0

    def read(
        self, latents: Tensor, agent_pos: Tensor, actions: Tensor, instruction_id: Tensor, reference: Tensor
    ) -> HeadsOutput:
        """Judge the present point; arguments as `worldsim.simulator.HeadsLike.read`."""
        point = latents[:, 1].reshape(-1, 3)
        distance = (point - point.new_tensor(self.goal)).norm(dim=1)
        success = (distance < self.tolerance).float()
        terms = torch.zeros(len(point), len(REWARD_TERMS), device=point.device)
        terms[:, REWARD_TERMS.index("reach")] = (1 - distance / self.failure_radius).clamp(0, 1)
        terms[:, REWARD_TERMS.index("success")] = success
        action = actions[:, 1]
        moved = torch.cat([agent_pos[:, :6] + action[:, :6], action[:, 6:]], dim=1)
        failure = (point.norm(dim=1) > self.failure_radius).float()
        return HeadsOutput(terms, success, failure, moved)
