"""A world model with known answers: a point that moves by the commanded translation, x' = x + a."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wfm_core.data.actions import ACTION_DIM
from wfm_core.world_model import ModelState, Reference

_ZERO_LEVEL = 127  # the pixel value of coordinate 0


@dataclass(frozen=True)
class ScriptedConfig:
    """Sizes of the scripted model.

    Attributes:
        frame_size: frames are (frame_size, frame_size, 3), one colour.
        metres_per_level: coordinate c of the point is (pixel value of channel c - 127) times this.
        noise: standard deviation of the noise on each step's translation, m; drawn from the row's seed.
        trusted_radius: the uncertainty is how far the point is from the origin beyond this, m.
    """

    frame_size: int = 128
    metres_per_level: float = 0.004
    noise: float = 0.0
    trusted_radius: float = 0.4


class ScriptedWorldModel:
    """Latents (1, 1, 3) are the point itself, m; its state is {"point" (B, 3), "seed" (B,), "step" (B,)}."""

    def __init__(self, config: ScriptedConfig | None = None) -> None:
        """Take the default sizes where no config is given."""
        self.config = config or ScriptedConfig()
        self.latent_shape = (1, 1, 3)
        self.frame_shape = (self.config.frame_size, self.config.frame_size, 3)

    def encode(self, frames: Tensor) -> Tensor:
        """Read the point off the mean colour: (B, T, H, W, 3) uint8 to (B, T, 1, 1, 3) float32, m."""
        colour = frames.float().mean(dim=(2, 3), keepdim=True)
        return (colour - _ZERO_LEVEL) * self.config.metres_per_level

    def decode(self, latents: Tensor, reference: Reference) -> Tensor:  # noqa: ARG002 (nothing to copy)
        """Paint the point: (B, 1, 1, 3) m to uint8 (B, H, W, 3); beyond the pixel range the colour saturates."""
        colour = (latents / self.config.metres_per_level + _ZERO_LEVEL).round().clamp(0, 255).to(torch.uint8)
        return colour.expand(-1, *self.frame_shape).contiguous()

    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], instructions: Sequence[str] | None = None
    ) -> ModelState:
        """Begin at the last of T context latents (B, T, 1, 1, 3); the T - 1 actions are checked and not needed.

        Raises:
            ValueError: actions of another shape than (B, T - 1, 7), or another number of seeds than B.
        """
        rows, steps = latents.shape[:2]
        if actions.shape != (rows, steps - 1, ACTION_DIM):
            raise ValueError(f"actions must have shape ({rows}, {steps - 1}, {ACTION_DIM}), got {tuple(actions.shape)}")
        if len(seeds) != rows:
            raise ValueError(f"seeds must have one entry for each of {rows} rows, got {len(seeds)}")
        return {
            "point": latents[:, -1].reshape(rows, 3).clone(),
            "seed": torch.tensor([int(seed) for seed in seeds], dtype=torch.int64),
            "step": torch.zeros(rows, dtype=torch.int64),
        }

    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Move each row's point by action[:3] m; see `WorldModel.step`."""
        point = state["point"] + action[:, :3]
        if self.config.noise:
            point = point + self.config.noise * _row_noise(state["seed"], state["step"])
        uncertainty = (point.norm(dim=1) - self.config.trusted_radius).clamp_min(0.0)
        state = {"point": point, "seed": state["seed"], "step": state["step"] + 1}
        return state, point.view(-1, *self.latent_shape), uncertainty


def _row_noise(seeds: Tensor, steps: Tensor) -> Tensor:
    """Draw (B, 3) normals, each row from its own seed and step only."""
    rows = []
    for seed, step in zip(seeds.tolist(), steps.tolist(), strict=True):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        rows.append(torch.randn(3, generator=generator))
    return torch.stack(rows)
