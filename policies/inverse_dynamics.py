"""Inverse dynamics on a world model's trunk: what was commanded between frames that show it, so that video teaches.

The trunk reads each frame for itself, as in `policies.wfm_policy`. One head compares a frame with those that follow,
for motion trails its command; another reads the arm's pose off a single frame.

Source: the use of inverse dynamics to label video follows Baker et al., "Video PreTraining" (2022).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from policies.actor import mlp
from policies.latents import LatentView
from policies.wfm_policy import frame_trunk
from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import build_config, load_weights, read_config, save_weights, write_config
from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM, to_physical
from wfm_core.data.episode import Episode
from worldsim.heads import AGENT_POS_CENTRE, AGENT_POS_SCALE

KIND = "inverse_dynamics"
INFERRED = "inferred"
"""The convention of an episode whose actions were inferred."""
FRAMES_AT_ONCE = 256


@dataclass
class InverseDynamicsConfig:
    """Which world model, and the sizes of the heads.

    Attributes:
        world_model: a shipped name or a folder, of kind autoregressive, of one camera.
        num_layers: of its trunk, the first ones; 0 takes all.
        num_frames: that an action is read from, the one before it and those that follow.
        patch_dim: numbers kept of each patch of a frame.
        hidden_dim: width of the heads.

    Raises:
        ValueError: fewer than two frames.
    """

    world_model: str = DEFAULT_WORLD_MODEL
    num_layers: int = 0
    num_frames: int = 3
    patch_dim: int = 32
    hidden_dim: int = 512

    def __post_init__(self) -> None:
        if self.num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, got {self.num_frames}")


class InverseDynamics(nn.Module):
    """Latents of frames that follow each other to an action, and of one frame to the arm's pose.

    Raises:
        ValueError: no such world model, or of another kind, or of several cameras.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, config: InverseDynamicsConfig) -> None:
        super().__init__()
        self.config = config
        self.view = LatentView(config.world_model)
        self.trunk = frame_trunk(self.view.folder, config.num_layers)
        self.kept = nn.Sequential(nn.LayerNorm(self.trunk.width), nn.Linear(self.trunk.width, config.patch_dim))
        self.frame_dim = self.trunk.side**2 * config.patch_dim
        self.action_head = mlp(config.num_frames * self.frame_dim, config.hidden_dim, ACTION_DIM)
        self.pose_head = mlp(self.frame_dim, config.hidden_dim, AGENT_POS_DIM)
        self.register_buffer("centre", torch.tensor(AGENT_POS_CENTRE), persistent=False)
        self.register_buffer("scale", torch.tensor(AGENT_POS_SCALE), persistent=False)

    def born(self) -> "InverseDynamics":
        """Take over the world model's weights, in place."""
        self.trunk.born_from(load_file(self.view.folder / "dynamics.safetensors"))
        return self

    def see(self, latents: Tensor) -> Tensor:
        """Map latents (N, h, w, C) to what is kept of each frame, (N, F)."""
        return self.kept(self.trunk(latents)).flatten(1)

    def actions(self, seen: Tensor) -> Tensor:
        """Map (B, num_frames, F) to the action (B, 7) after the first: normalised, but the gripper a logit of open."""
        return self.action_head(seen.flatten(1))

    def poses(self, seen: Tensor) -> Tensor:
        """Map (N, F) to `agent_pos` (N, 7), in units of its scale about its centre."""
        return self.pose_head(seen)

    @torch.no_grad()
    def infer(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Infer what was commanded, and where the arm was.

        Args:
            frames: (T + 1, H, W, 3) uint8.

        Returns:
            Actions (T, 7) and `agent_pos` (T + 1, 7), float32, physical units; what follows the last frame is taken for
            one more like it.

        Raises:
            ValueError: frames of another size than the world model's.
        """
        self.eval()
        parts = [frames[k : k + FRAMES_AT_ONCE] for k in range(0, len(frames), FRAMES_AT_ONCE)]
        seen = torch.cat([self.see(self.view.of({"pixels": part})) for part in parts])
        steps = torch.arange(len(frames) - 1)[:, None] + torch.arange(self.config.num_frames)
        actions = self.actions(seen[steps.clamp(max=len(frames) - 1)]).float()
        actions[:, -1] = torch.where(actions[:, -1] > 0, 1.0, -1.0)
        poses = self.poses(seen).float() * self.scale + self.centre
        return to_physical(actions.clamp(-1, 1).numpy()), poses.numpy()

    def label(self, episode: Episode) -> Episode:
        """Return an episode with inferred actions, and inferred poses where it has none; errors as for `infer`."""
        actions, agent_pos = self.infer(episode.frames)
        agent_pos = agent_pos if episode.agent_pos is None else episode.agent_pos
        return replace(episode, actions=actions, agent_pos=agent_pos, convention=INFERRED, command_lag=1)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (float16); each appears whole or not at all."""
        save_weights(folder, "model", self.state_dict())
        write_config(folder, {"kind": KIND, **asdict(self.config)})


def load_inverse_dynamics(folder: str | Path) -> InverseDynamics:
    """Load a folder written by `InverseDynamics.save`.

    Raises:
        ValueError: a file is missing or damaged, it holds something else, or weights and configuration disagree.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.get("kind") != KIND:
        raise ValueError(f"{folder} must hold inverse dynamics (recipe=inverse_dynamics), got {config.get('kind')!r}")
    network = InverseDynamics(build_config(InverseDynamicsConfig, config, folder))
    return load_weights(network, folder, "model")
