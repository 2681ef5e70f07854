from dataclasses import replace

import pytest
import torch

from worldsim.state import SimState


def state(rows: int, offset: float = 0.0) -> SimState:
    count = torch.arange(rows) + offset
    return SimState(
        model={"cache": count[:, None].repeat(1, 5).float(), "step": count.long()},
        latents=count.view(-1, 1, 1, 1).float(),
        agent_pos=count[:, None].repeat(1, 7).float(),
        previous_action=count[:, None].repeat(1, 7).float(),
        instruction_id=count.long(),
        elapsed=count.long(),
        reference_frames=count.view(-1, 1, 1, 1).to(torch.uint8),
        reference_latents=count.view(-1, 1, 1, 1).float(),
    )


def rows_of(state: SimState) -> list[float]:
    columns = {name: value.flatten(1)[:, 0].tolist() if value.ndim > 1 else value.tolist()
               for name, value in state.as_tensors().items()}  # fmt: skip
    assert len({tuple(column) for column in columns.values()}) == 1, columns  # every tensor moved alike
    return next(iter(columns.values()))


def test_rows_are_repeated_taken_joined_and_replaced_in_every_tensor():
    a = state(3)
    assert rows_of(a.repeat(2)) == [0, 0, 1, 1, 2, 2]
    assert rows_of(a.take(slice(1, 3))) == [1, 2]
    assert rows_of(a.take(torch.tensor([2, 0]))) == [2, 0]
    assert rows_of(SimState.concatenate([a, state(2, 10)])) == [0, 1, 2, 10, 11]
    assert rows_of(a.put(torch.tensor([2, 0]), state(2, 10))) == [11, 1, 10]
    assert rows_of(SimState.merge(torch.tensor([True, False, True]), state(3, 10), a)) == [10, 1, 12]
    assert rows_of(a) == [0, 1, 2] and a.num_rows == 3


def test_misfits_are_named():
    a = state(2)
    odd = replace(a.take(slice(1)), model={"cache": torch.zeros(1, 6), "step": torch.zeros(1).long()})
    with pytest.raises(ValueError, match=r"model.cache must have equal row shapes, got \(5,\) and \(6,\)"):
        a.put(torch.tensor([0]), odd)
    with pytest.raises(ValueError, match="2 indices, got 1"):
        a.put(torch.tensor([0, 1]), state(1))
    with pytest.raises(ValueError, match="same tensors"):
        SimState.concatenate([a, replace(a, model={})])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        a.repeat(0)
