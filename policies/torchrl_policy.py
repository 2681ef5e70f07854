"""TorchRL policies as ours, and the actor that TorchRL trains in our envs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wfm_core.checkpoint import build_config, load_weights, read_config, save_weights, write_config
from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM
from worldsim.protocols import Obs, Policy

INSTALL = "pip install 'worldsim[torchrl]'"


@dataclass
class TorchRLConfig:
    """Sizes of `build_actor`.

    Attributes:
        image_size: height and width of `pixels`.
        width: channels of the first of three strided convolutions; the later ones have twice as many.
        hidden_dims: widths of the layers after them.
    """

    image_size: int = 128
    width: int = 16
    hidden_dims: list[int] = field(default_factory=lambda: [128, 128])


class TorchRLPolicy:
    """Runs the mode of a TorchRL actor; the actor keeps no state, so `reset` only counts rows.

    Args:
        actor: a TensorDictModule that reads "pixels" (B, H, W, 3) uint8 and "agent_pos" (B, 7) and writes "action".
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor.eval()

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

        batch = TensorDict(
            {key: torch.from_numpy(np.array(value)) for key, value in obs.items()}, len(obs["agent_pos"])
        )
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
    module = TensorDictModule(_ActorNetwork(config), in_keys=["pixels", "agent_pos"], out_keys=["loc", "scale"])
    return ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0},
        return_log_prob=True,
    )


def load_torchrl(folder: Path) -> Policy:
    """Load a folder written by `save_torchrl`.

    Raises:
        ValueError: a file is missing or damaged, or weights and configuration disagree.
        ImportError: torchrl is not installed.
    """
    config = build_config(TorchRLConfig, read_config(folder), folder)
    return TorchRLPolicy(load_weights(build_actor(config), folder, "model"))


def save_torchrl(actor: Any, config: TorchRLConfig, folder: Path) -> None:
    """Write an actor of `build_actor(config)`, its weights in full so that training can go on from them."""
    save_weights(folder, "model", actor.state_dict(), torch.float32)
    write_config(folder, {"kind": "torchrl", **asdict(config)})


class _ActorNetwork(nn.Module):
    """Pixels (..., H, W, 3) and agent_pos (..., 7) to mean and standard deviation, each (..., 7)."""

    def __init__(self, config: TorchRLConfig) -> None:
        super().__init__()
        width = config.width
        self.conv = nn.Sequential(
            *(nn.Conv2d(3, width, 4, 4), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, 2), nn.ReLU(), nn.Flatten()),
        )
        with torch.no_grad():
            features = self.conv(torch.zeros(1, 3, config.image_size, config.image_size)).shape[1]
        sizes = [features + AGENT_POS_DIM, *config.hidden_dims]
        layers = [layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * ACTION_DIM))

    def forward(self, pixels: Tensor, agent_pos: Tensor) -> tuple[Tensor, Tensor]:
        batch = agent_pos.shape[:-1]
        frames = pixels.reshape(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2).float() / 255
        features = self.conv(frames).unflatten(0, batch) if batch else self.conv(frames)[0]
        mean, log_std = self.head(torch.cat([features, agent_pos], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 1).exp()
