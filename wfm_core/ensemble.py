"""Several world models side by side: how far apart they go says how far to trust them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wfm_core.world_model import ModelState, Reference, WorldModel

SEED_STRIDE = 1 << 32
"""Between the seeds of one member and the next, so that a model that is there twice draws anew."""


class Ensemble:
    """Implements `WorldModel`; what it imagines is what its first member does.

    Members are different weights, or the same ones several times, which then differ in what they draw. Each imagines a
    future of its own; the uncertainty of a step is the root mean square distance of the members' latents from their
    mean, which therefore counts all that has gone apart since the start.

    Source: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation Using Deep Ensembles"
    (NeurIPS 2017).
    """

    def __init__(self, members: Sequence[WorldModel]) -> None:
        """Put members together that share a tokenizer.

        Raises:
            ValueError: fewer than two, or members with latents of different shapes.
        """
        if len(members) < 2:
            raise ValueError(f"an ensemble needs at least 2 members, got {len(members)}")
        if len(shapes := {member.latent_shape for member in members}) > 1:
            raise ValueError(f"members must have latents of one shape, got {sorted(shapes)}")
        self.members = list(members)
        self.latent_shape, self.frame_shape = members[0].latent_shape, members[0].frame_shape

    def encode(self, frames: Tensor) -> Tensor:
        """As the first member does; see `WorldModel`."""
        return self.members[0].encode(frames)

    def decode(self, latents: Tensor, reference: Reference) -> Tensor:
        """As the first member does; see `WorldModel`."""
        return self.members[0].decode(latents, reference)

    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], instructions: Sequence[str] | None = None
    ) -> ModelState:
        """Prefill the context of every member; see `WorldModel`."""
        state: ModelState = {}
        for k, member in enumerate(self.members):
            own = member.start(latents, actions, [seed + k * SEED_STRIDE for seed in seeds], instructions)
            state |= {f"{k}.{name}": value for name, value in own.items()}
        return state

    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Advance every member; see `WorldModel`."""
        after: ModelState = {}
        made = []
        for k, member in enumerate(self.members):
            prefix = f"{k}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            own, latents, _ = member.step(own, action)
            after |= {prefix + name: value for name, value in own.items()}
            made.append(latents)
        apart = torch.stack(made).var(dim=0, correction=0)
        return after, made[0], apart.mean(dim=(1, 2, 3)).sqrt()
