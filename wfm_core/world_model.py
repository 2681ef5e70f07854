"""The world-model protocol: what every family (autoregressive, diffusion, scripted) offers to the layers above."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ModelState = dict[str, Tensor]
"""The whole recurrent state (cached context, row seeds, ...): named tensors, each with leading dimension B.

States are values: no method changes one in place, so a planner branches by `repeat_rows` and an env restarts rows by
`merge_rows`.
"""


class Reference(NamedTuple):
    """Real frames that a decoder may copy from, one of the same episode for each row.

    Attributes:
        frames: (B, H, W, 3) uint8.
        latents: (B, h, w, C) float32, their encoding.
    """

    frames: Tensor
    latents: Tensor

    def take(self, rows: Tensor | slice) -> "Reference":
        """Return the rows of an index tensor, a bool mask or a slice."""
        return Reference(self.frames[rows], self.latents[rows])


class Layout(NamedTuple):
    """How a frame's tokens lie; tokenizer and dynamics must agree.

    Attributes:
        cells: cameras, rows and columns.
        levels: FSQ levels of a cell's dimensions.
    """

    cells: tuple[int, int, int]
    levels: tuple[int, ...]


class WorldModel(Protocol):
    """Predicts the latents of the next frame from the past and an action; batch-first, rows independent."""

    latent_shape: tuple[int, int, int]
    """(h, w, C) of one frame's latents."""
    frame_shape: tuple[int, int, int]
    """(H, W, 3) of one frame."""

    def encode(self, frames: Tensor) -> Tensor:
        """Encode uint8 frames (B, T, H, W, 3) to float32 latents (B, T, h, w, C)."""
        ...

    def start(
        self, latents: Tensor, actions: Tensor, seeds: Sequence[int], instructions: Sequence[str] | None = None
    ) -> ModelState:
        """Prefill the context.

        Args:
            latents: (B, T, h, w, C) latents of T >= 1 context frames.
            actions: (B, T - 1, 7) physical actions between them.
            seeds: B ints; a row's samples depend on its own seed only.
            instructions: B texts, for a model that reads; the others take no notice.
        """
        ...

    def step(self, state: ModelState, action: Tensor) -> tuple[ModelState, Tensor, Tensor]:
        """Advance one control step.

        Args:
            state: as returned by `start` or `step`; left unchanged.
            action: (B, 7) float32 physical action.

        Returns:
            The next state, the next frame's latents (B, h, w, C) and the uncertainty (B,) >= 0 of this prediction.
        """
        ...

    def decode(self, latents: Tensor, reference: Reference) -> Tensor:
        """Decode latents (B, h, w, C) to uint8 frames (B, H, W, 3); the reference is a context frame of each row."""
        ...


def no_motion(like: Tensor) -> Tensor:
    """The physical action (..., 7) that moves nothing, with the gripper as in an action or a pose (..., 7)."""
    still = torch.zeros_like(like)
    still[..., -1] = like[..., -1]
    return still


def repeat_rows(state: ModelState, times: int) -> ModelState:
    """Repeat every row `times` times: rows (a, b) become (a, a, b, b) for times = 2."""
    return {name: value.repeat_interleave(times, dim=0) for name, value in state.items()}


def merge_rows(mask: Tensor, new: ModelState, old: ModelState) -> ModelState:
    """Take the rows where `mask` (B,) bool is set from `new` and the others, bit for bit, from `old`."""
    return {name: torch.where(mask.view(-1, *[1] * (value.ndim - 1)), new[name], value) for name, value in old.items()}
