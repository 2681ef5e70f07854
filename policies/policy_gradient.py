"""What a policy learns from its decisions: advantages, and the losses that follow them.

Sources: Schulman et al. 2016 (generalised advantage estimation) and 2017 (PPO's clip); Shao et al. 2024 (advantages
relative to a group of episodes that begin alike); Yu et al. 2025 (DAPO: a higher upper clip, groups that are all alike
left out).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from policies.actor import ActorNetwork
from policies.imagining import MOTION, Decisions, Episodes, Explorer
from policies.reinforce_config import ReinforceConfig
from policies.train import cloning_loss
from wfm_core.train import Batch


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
    displaced, opened = (explorer.log_prob(known, batch.actions) - batch.log_prob).tensor_split([1], dim=1)
    log_ratio = displaced[:, 0] + (opened * _executed(batch)).sum(dim=1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    with torch.no_grad():
        metrics = {"approx_kl": (ratio - 1 - log_ratio).mean(), "clipped": (ratio != clipped).float().mean()}
    return loss, metrics


def divergence(explorer: Explorer, aims: Tensor, start_aims: Tensor, batch: Decisions) -> Tensor:
    """Mean divergence of decisions about `aims` from those about `start_aims`, (N, E, 7) each, in what was executed.

    That of motions is the mean over a decision's, which one displacement decides; that of grippers is their sum.
    """
    executed = _executed(batch)
    moved = (aims - start_aims)[..., MOTION].square().sum(dim=-1) / (2 * explorer.action_std**2)
    moved = moved * executed / executed.sum(dim=1, keepdim=True).clamp(min=1)
    # In logits: torch's own is infinite where one is sure of an open or a closed gripper.
    opened, start_opened = aims[..., -1], start_aims[..., -1]
    gripper = opened.sigmoid() * (opened - start_opened)
    gripper = gripper + functional.softplus(start_opened) - functional.softplus(opened)
    return (moved + gripper * executed).sum(dim=1).mean()


def learn(
    explorer: Explorer,
    start: Explorer | None,
    optimizer: torch.optim.Optimizer,
    decisions: Decisions,
    advantage: Tensor,
    target: Tensor,
    actor_learns: bool,
    shown: Iterator[Batch] | None,
    config: ReinforceConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Pass over the decisions; returns the means of what there is to tell.

    Args:
        explorer: who made them, changed in place.
        start: who it was when training began, for `config.kl`.
        optimizer: of what is trained.
        decisions: N of them.
        advantage: (N,).
        target: (N,) of the value.
        actor_learns: not the value alone.
        shown: demonstrations, a batch of them beside each of decisions.
        config: settings.
        generator: of the order.

    Raises:
        FloatingPointError: the loss or its gradient is not finite.
    """
    network, rows = explorer.network, []

    def once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same of rows, computed now for all of them."""
        with torch.no_grad():
            every = [function(part) for part in torch.arange(len(decisions)).split(config.batch_size)]
        return torch.cat(every).__getitem__

    def look_now(part: Tensor) -> Tensor:
        return network.look(decisions.picture[part])

    def know_now(part: Tensor) -> Tensor:
        return network.know(look(part), decisions.agent_pos[part], decisions.instruction_id[part])

    def aims(start: Explorer, part: Tensor) -> Tensor:
        """What the policy that training began with would do; what is not trained it has in common with this one."""
        looked = start.network.look(decisions.picture[part]) if config.trained == "all" else look(part)
        told = decisions.agent_pos[part], decisions.instruction_id[part]
        return start.aims(start.network.know(looked, *told))

    look = look_now if config.trained == "all" else once(look_now)
    know = once(know_now) if config.trained == "heads" else know_now
    aims_before = None if start is None else once(partial(aims, start))
    network.train()
    for _ in range(config.num_epochs):
        for part in torch.randperm(len(decisions), generator=generator).split(config.batch_size):
            batch = decisions.take(part)
            known = know(part)
            loss, metrics = clipped_loss(explorer, known, batch, advantage[part], config.clip_low, config.clip_high)
            if aims_before is not None:
                away = divergence(explorer, explorer.aims(known), aims_before(part), batch)
                loss, metrics = loss + config.kl * away, metrics | {"divergence": away.detach()}
            if shown is not None:
                cloned = loss_of_demonstrations(network, next(shown), config.trained)
                loss, metrics = loss + config.cloning * cloned, metrics | {"cloning": cloned.detach()}
            value_loss = (explorer.value(known) - target[part]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            (actor_learns * loss + value_loss).backward()
            step_if_finite(explorer, optimizer, loss + value_loss)
            rows.append(metrics | {"loss": loss.detach(), "value_loss": value_loss.detach()})
    network.eval()
    return {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}


def loss_of_demonstrations(network: ActorNetwork, demo: Batch, trained: str) -> Tensor:
    """Return the loss of cloning on a batch of `CloningObjective`, with respect to what is trained."""
    with torch.set_grad_enabled(trained == "all"):
        looked = network.look(demo["picture"])
    found = network.decide(network.know(looked, demo["agent_pos"], demo["instruction_id"]))
    return cloning_loss(network, *found, demo)[0]


def step_if_finite(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take a step upon a loss whose gradients are there.

    Raises:
        FloatingPointError: the loss or its gradient is not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise FloatingPointError(f"the loss is {loss}, its gradient {norm}")
    optimizer.step()


def _executed(batch: Decisions) -> Tensor:
    """Which actions (N, E) of the decisions were executed."""
    return torch.arange(batch.actions.shape[1], device=batch.executed.device) < batch.executed[:, None]
