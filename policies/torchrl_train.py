"""Train TorchRL's PPO in a TorchRL env whose state is in the tensordict, resuming to the bit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from policies.run_state import RunState, seed_of
from policies.torchrl_policy import INSTALL, TorchRLConfig, build_actor, build_critic, save_torchrl


@dataclass
class TorchRLTrainConfig:
    """One training by PPO; names and meanings are TorchRL's where it has them.

    Attributes:
        num_steps: control steps of all rows together.
        rollout_steps: of each row between updates; rows begin anew in each.
        hidden_dims: widths of actor and critic, which share nothing.
    """

    num_steps: int = 200_000
    rollout_steps: int = 32
    batch_size: int = 512
    num_epochs: int = 5
    gamma: float = 0.98
    lmbda: float = 0.95
    clip_epsilon: float = 0.2
    entropy_coeff: float = 1e-3
    learning_rate: float = 3e-4
    hidden_dims: list[int] = field(default_factory=lambda: [256, 256])
    seed: int = 0


def train_torchrl(
    env: Any,
    config: TorchRLTrainConfig,
    out_dir: Path,
    *,
    made_of: dict[str, object],
    world_model: str,
    on_update: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train a policy on "latents" and "agent_pos", and write its folder; resumes if killed.

    Args:
        env: an `envs.torchrl_env.TorchRLBridgeEnv` that observes latents.
        config: settings.
        out_dir: the policy's folder; its state lies next to it in `<out_dir>.run`.
        made_of: what the env is made of, as JSON values; it must be the run's own.
        world_model: that of the latents; the policy encodes pixels with it where there are no latents.
        on_update: called with the steps made and what there is to tell.

    Returns:
        The last update's success rate and mean reward of a step.

    Raises:
        ValueError: what lies in the run's folder is of another run.
        FloatingPointError: the loss is not finite; names the last good state.
        ImportError: torchrl is not installed.
    """
    try:
        from torchrl.objectives import ClipPPOLoss
        from torchrl.objectives.value import GAE
    except ImportError as error:
        raise ImportError(f"recipe=torchrl needs torchrl: {INSTALL}") from error
    shape = list(env.observation_spec["latents"].shape[1:])
    sizes = TorchRLConfig(latent_shape=shape, world_model=world_model, hidden_dims=list(config.hidden_dims))
    torch.manual_seed(config.seed)
    actor, critic = build_actor(sizes), build_critic(sizes)
    loss_fn = ClipPPOLoss(
        actor, critic, clip_epsilon=config.clip_epsilon, entropy_coeff=config.entropy_coeff, normalize_advantage=True
    )
    advantage = GAE(gamma=config.gamma, lmbda=config.lmbda, value_network=critic)
    optimizer = torch.optim.Adam(loss_fn.parameters(), config.learning_rate)
    decides = {name: value for name, value in asdict(config).items() if name != "num_steps"}  # it may be made longer
    path = out_dir.with_name(out_dir.name + ".run") / "state.safetensors"
    both = nn.ModuleDict({"actor": actor, "critic": critic})
    state = RunState(path, both, optimizer, decides | made_of)
    told = state.resume()
    done = int(told.get("steps", 0))
    while done < config.num_steps:
        seed = seed_of(config.seed, done)
        torch.manual_seed(seed)  # TorchRL draws actions from torch's own generator
        env.set_seed(seed)
        data, told = _rollout(env, actor, config.rollout_steps)
        with torch.no_grad():
            data = advantage(data).reshape(-1)
        for _ in range(config.num_epochs):
            for part in torch.randperm(len(data)).split(config.batch_size):
                losses = loss_fn(data[part])
                loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                if not loss.isfinite():
                    raise FloatingPointError(f"loss is {loss} after {done} steps; the last good state is {path}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(loss_fn.parameters(), 0.5)
                optimizer.step()
        done += len(data)
        told["steps"] = done
        state.keep(told)
        if on_update is not None:
            on_update(done, told)
    save_torchrl(actor, sizes, out_dir)
    return told


@torch.no_grad()
def _rollout(env: Any, actor: Any, num_steps: int) -> tuple[Any, dict[str, float]]:
    """Steps (B, T) without the env's state, and what they tell."""
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    now, steps = env.reset(), []
    with set_exploration_type(ExplorationType.RANDOM):  # the actor's own way is its mode
        for _ in range(num_steps):
            both, now = env.step_and_maybe_reset(actor(now))
            steps.append(both.exclude("state", ("next", "state")))
    data: Any = torch.stack(steps, dim=1).contiguous()  # tensordicts
    ended = data["next", "done"]
    success = data["next", "is_success"][ended].float().mean() if ended.any() else torch.tensor(torch.nan)
    return data, {"success": float(success), "reward": float(data["next", "reward"].mean())}
