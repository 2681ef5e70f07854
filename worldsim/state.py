"""The simulator's state: a value that is passed in and returned, so that planners branch and envs restart rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from wfm_core.world_model import ModelState, Reference, merge_rows, repeat_rows


@dataclass(frozen=True)
class SimState:
    """B rows of imagination. No method changes a state in place; every tensor has the leading dimension B.

    Attributes:
        model: the world model's own state.
        latents: (B, h, w, C) float32, of the present frame.
        agent_pos: (B, 7) float32, present end-effector pose and gripper, m, rad, openness.
        previous_action: (B, 7) float32 physical, that which led here.
        instruction_id: (B,) int64, what the heads call the instruction.
        elapsed: (B,) int64, control steps since `WorldSim.start`.
        reference_frames: (B, H, W, 3) uint8, the last context frame.
        reference_latents: (B, h, w, C) float32, its latents.
    """

    model: ModelState
    latents: Tensor
    agent_pos: Tensor
    previous_action: Tensor
    instruction_id: Tensor
    elapsed: Tensor
    reference_frames: Tensor
    reference_latents: Tensor

    @property
    def num_rows(self) -> int:
        """The number of rows B."""
        return len(self.latents)

    @property
    def reference(self) -> Reference:
        """What the decoder may copy from."""
        return Reference(self.reference_frames, self.reference_latents)

    def repeat(self, times: int) -> "SimState":
        """Repeat every row `times` times: rows (a, b) become (a, a, b, b) for times = 2.

        Raises:
            ValueError: times below 1.
        """
        if times < 1:
            raise ValueError(f"times must be at least 1, got {times}")
        return SimState.from_tensors(repeat_rows(self.as_tensors(), times))

    def take(self, rows: Tensor | slice) -> "SimState":
        """Return the rows of an index tensor, a bool mask or a slice."""
        return SimState.from_tensors({name: value[rows] for name, value in self.as_tensors().items()})

    def put(self, rows: Tensor, new: "SimState") -> "SimState":
        """Return this state with the rows at `rows` (n,) int64 replaced by the n rows of `new`, the others bit for bit.

        Raises:
            ValueError: `new` has another number of rows, or tensors of other names or shapes.
        """
        if new.num_rows != len(rows):
            raise ValueError(f"new must have one row for each of {len(rows)} indices, got {new.num_rows}")
        old_tensors, new_tensors = self.as_tensors(), new.as_tensors()
        _check_same_layout(old_tensors, new_tensors)
        put = {name: old.index_copy(0, rows, new_tensors[name]) for name, old in old_tensors.items()}
        return SimState.from_tensors(put)

    @staticmethod
    def merge(mask: Tensor, new: "SimState", old: "SimState") -> "SimState":
        """Take the rows where `mask` (B,) bool is set from `new` and the others, bit for bit, from `old`.

        Raises:
            ValueError: the states have tensors of other names or shapes.
        """
        _check_same_layout(old.as_tensors(), new.as_tensors())
        return SimState.from_tensors(merge_rows(mask, new.as_tensors(), old.as_tensors()))

    @staticmethod
    def concatenate(states: Sequence["SimState"]) -> "SimState":
        """Join the rows of several states.

        Raises:
            ValueError: no state, or states with tensors of other names or shapes.
        """
        if not states:
            raise ValueError("states must hold at least one state, got none")
        tensors = [state.as_tensors() for state in states]
        for other in tensors[1:]:
            _check_same_layout(tensors[0], other)
        return SimState.from_tensors({name: torch.cat([other[name] for other in tensors]) for name in tensors[0]})

    def as_tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, the model's with the prefix "model."."""
        own = {name: getattr(self, name) for name in _OWN}
        return own | {f"model.{name}": value for name, value in self.model.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "SimState":
        """Make a state of what `as_tensors` gave."""
        model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        return SimState(model=model, **{name: tensors[name] for name in _OWN})


_OWN = tuple(field.name for field in fields(SimState) if field.name != "model")


def _check_same_layout(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    if old.keys() != new.keys():
        raise ValueError(f"states must hold the same tensors, got {sorted(old)} and {sorted(new)}")
    for name, value in old.items():
        if value.shape[1:] != new[name].shape[1:]:
            raise ValueError(
                f"{name} must have equal row shapes, got {tuple(value.shape[1:])} and {tuple(new[name].shape[1:])}"
            )
