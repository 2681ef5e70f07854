"""TorchRL policies as ours, and the actor that TorchRL trains in our envs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies.latents import LatentView
from wfm_core.checkpoint import build_config, load_weights, read_config, save_weights, write_config
from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM
from worldsim.protocols import Obs, Policy

INSTALL = "pip install 'worldsim[torchrl]'"


@dataclass
class TorchRLConfig:
    """Sizes of `build_actor`.

    Attributes:
        image_size: height and width of `pixels`.
        latent_shape: (h, w, C) of `latents`, which it then reads instead; empty: it reads pixels.
        world_model: that whose latents these are.
        width: channels of the first of three strided convolutions; the later ones have twice as many.
        hidden_dims: widths of the layers after them.
    """

    image_size: int = 128
    latent_shape: list[int] = field(default_factory=list)
    world_model: str = ""
    width: int = 16
    hidden_dims: list[int] = field(default_factory=lambda: [128, 128])


class TorchRLPolicy:
    """Runs the mode of a TorchRL actor; the actor keeps no state, so `reset` only counts rows.

    Args:
        actor: a TensorDictModule that reads "agent_pos" (B, 7) and "pixels" (B, H, W, 3) uint8, or "latents" if there
            is a view, and writes "action".
        view: gives the latents.
    """

    def __init__(self, actor: Any, view: LatentView | None = None) -> None:
        self.actor = actor.eval()
        self._view = view

    def reset(self, num_envs: int, *, instruction: str, seeds: Sequence[int], mask: np.ndarray | None = None) -> None:
        """Begin episodes; see `worldsim.protocols.Policy.reset`.

        Raises:
            ValueError: `seeds` does not have `num_envs` entries.
        """
        if len(seeds) != num_envs:
            raise ValueError(f"reset needs one seed a row ({num_envs}), got {len(seeds)}")

    @torch.no_grad()
    def act(self, obs: Obs) -> np.ndarray:
        """Return (B, 7) float32 actions in [-1, 1]."""
        from tensordict import TensorDict
        from torchrl.envs.utils import ExplorationType, set_exploration_type

        seen = {key: torch.from_numpy(np.array(value)) for key, value in obs.items()}
        if self._view is not None:
            seen["latents"] = self._view.of(obs)
        batch = TensorDict(seen, [len(obs["agent_pos"])])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            action = self.actor(batch)["action"]
        return action.clamp(-1, 1).float().numpy()


def build_actor(config: TorchRLConfig) -> Any:
    """Return a ProbabilisticActor with a tanh-squashed normal over the action box.

    Raises:
        ImportError: torchrl is not installed.
    """
    try:
        from tensordict.nn import TensorDictModule
        from torchrl.modules import ProbabilisticActor, TanhNormal
    except ImportError as error:
        raise ImportError(f"a TorchRL policy needs torchrl: {INSTALL}") from error
    network = _Head(config, 2 * ACTION_DIM)
    module = TensorDictModule(_ActorNetwork(network), in_keys=observed_keys(config), out_keys=["loc", "scale"])
    return ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0},
        return_log_prob=True,
    )


def observed_keys(config: TorchRLConfig) -> list[str]:
    """Return what an actor reads."""
    return ["latents" if config.latent_shape else "pixels", "agent_pos"]


def build_critic(config: TorchRLConfig) -> Any:
    """Return a ValueOperator of the actor's sizes, which shares nothing with it."""
    from torchrl.modules import ValueOperator

    return ValueOperator(_Head(config, 1), in_keys=observed_keys(config))


def load_torchrl(folder: Path) -> Policy:
    """Load a folder written by `save_torchrl`.

    Raises:
        ValueError: a file is missing or damaged, or weights and configuration disagree.
        ImportError: torchrl is not installed.
    """
    config = build_config(TorchRLConfig, read_config(folder), folder)
    view = LatentView(config.world_model) if config.latent_shape else None
    return TorchRLPolicy(load_weights(build_actor(config), folder, "model"), view)


def save_torchrl(actor: Any, config: TorchRLConfig, folder: Path) -> None:
    """Write an actor of `build_actor(config)`, its weights in full so that training can go on from them."""
    save_weights(folder, "model", actor.state_dict(), torch.float32)
    write_config(folder, {"kind": "torchrl", **asdict(config)})


class _Head(nn.Module):
    """Pixels (..., H, W, 3) or latents (..., h, w, C), and agent_pos (..., 7), to (..., out_dim)."""

    def __init__(self, config: TorchRLConfig, out_dim: int) -> None:
        super().__init__()
        width = config.width
        if config.latent_shape:
            self.eye: nn.Module = nn.Flatten()
            features = math.prod(config.latent_shape)
        else:
            self.eye = nn.Sequential(
                *(nn.Conv2d(3, width, 4, 4), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2), nn.ReLU()),
                *(nn.Conv2d(2 * width, 2 * width, 3, 2), nn.ReLU(), nn.Flatten()),
            )
            with torch.no_grad():
                features = self.eye(torch.zeros(1, 3, config.image_size, config.image_size)).shape[1]
        sizes = [features + AGENT_POS_DIM, *config.hidden_dims]
        layers = [layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim))

    def forward(self, picture: Tensor, agent_pos: Tensor) -> Tensor:
        batch = agent_pos.shape[:-1]
        frames = picture.reshape(-1, *picture.shape[-3:]).permute(0, 3, 1, 2).float()
        features = self.eye(frames / 255 if picture.dtype == torch.uint8 else frames)
        return self.head(torch.cat([features.unflatten(0, batch) if batch else features[0], agent_pos], dim=-1))


class _ActorNetwork(nn.Module):
    """What an action is drawn from: mean and standard deviation, each (..., 7)."""

    def __init__(self, head: _Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, picture: Tensor, agent_pos: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.head(picture, agent_pos).chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 1).exp()
