"""What a policy learns from its decisions: advantages, and the losses that follow them.

Sources: Schulman et al. 2016 (generalised advantage estimation) and 2017 (PPO's clip); Shao et al. 2024 (advantages
relative to a group of episodes that begin alike); Yu et al. 2025 (DAPO: a higher upper clip, groups that are all alike
left out).
"""

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn import functional

from policies.imagining import Decisions, Episodes, Explorer


def advantages(decisions: Decisions, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantage (N,) and target of the value (N,) of each decision, by generalised advantage estimation.

    Args:
        decisions: in the order in which they were made.
        gamma: discount of a control step.
        gae_lambda: of a decision.
    """
    discount = gamma**decisions.executed
    surprise = decisions.reward + discount * decisions.next_value - decisions.value
    out = torch.zeros_like(surprise)
    for k in reversed(range(len(out))):  # what comes after has a higher index
        follows = int(decisions.next[k])
        out[k] = surprise[k] + (discount[k] * gae_lambda * out[follows] if follows >= 0 else 0)
    return out, out + decisions.value


def group_advantages(decisions: Decisions, episodes: Episodes, group_size: int) -> tuple[Tensor, Tensor]:
    """Advantage (N,) of each decision, that of its episode's success among its group, and which count, (N,) bool.

    Episodes g * `group_size` to (g + 1) * `group_size` - 1 are a group. One that is all success or all failure says
    nothing and is left out.
    """
    success = torch.from_numpy(episodes.success.reshape(-1, group_size)).float()
    spread = success.std(dim=1, keepdim=True)
    relative = ((success - success.mean(dim=1, keepdim=True)) / spread.clamp(min=1e-6)).flatten()
    return relative[decisions.episode], (spread > 0).expand_as(success).flatten()[decisions.episode]


def clipped_loss(
    explorer: Explorer, known: Tensor, batch: Decisions, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss, and how far the policy has moved.

    Args:
        explorer: the policy as it is now.
        known: (N, known_dim), of the decisions.
        batch: the decisions.
        advantage: (N,).
        clip_low: how far the ratio of probabilities may fall before it stops to count.
        clip_high: how far it may rise.
    """
    log_ratio = ((explorer.log_prob(known, batch.actions) - batch.log_prob) * _executed(batch)).sum(dim=1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    with torch.no_grad():
        metrics = {"approx_kl": (ratio - 1 - log_ratio).mean(), "clipped": (ratio != clipped).float().mean()}
    return loss, metrics


def divergence(explorer: Explorer, aims: Tensor, start_aims: Tensor, batch: Decisions) -> Tensor:
    """Mean divergence of decisions about `aims` from those about `start_aims`, (N, E, 7) each, in what was executed."""
    motion, start_motion = (explorer.distributions(each)[0] for each in (aims, start_aims))
    moved = kl_divergence(motion, start_motion).sum(dim=-1)
    # In logits: torch's own is infinite where one is sure of an open or a closed gripper.
    opened, start_opened = aims[..., -1], start_aims[..., -1]
    gripper = opened.sigmoid() * (opened - start_opened)
    gripper = gripper + functional.softplus(start_opened) - functional.softplus(opened)
    return ((moved + gripper) * _executed(batch)).sum(dim=1).mean()


def _executed(batch: Decisions) -> Tensor:
    """Which actions (N, E) of the decisions were executed."""
    return torch.arange(batch.actions.shape[1], device=batch.executed.device) < batch.executed[:, None]
