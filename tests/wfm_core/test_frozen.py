"""What `frozen` gives back, with a compiler that does nothing: there is a test of the real one in test_simulator.py."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from wfm_core.packing import copied, frozen


class Pair(NamedTuple):
    first: torch.Tensor
    second: str


@dataclass(frozen=True)
class Box:
    state: dict[str, torch.Tensor]
    pair: Pair
    count: int


@pytest.mark.parametrize(("device", "mode", "is_copy"), [("cpu", None, False), ("cuda", "reduce-overhead", True)])
def test_what_a_graph_will_write_again_is_copied(monkeypatch, device, mode, is_copy):
    memory = torch.zeros(3)  # as a CUDA graph has it: every call writes its result there
    seen = []

    def compile_nothing(function, *, dynamic, mode):
        seen.append((dynamic, mode))
        return function

    def step(add):
        assert not torch.is_grad_enabled() and torch._inductor.config.freezing
        memory.add_(add)
        return Box({"a": memory}, Pair(memory, "b"), 7), (memory, [memory])

    monkeypatch.setattr(torch, "compile", compile_nothing)
    run = frozen(step, torch.device(device))
    assert seen == [(False, mode)]
    (box, (plain, kept)), _ = run(1), run(2)
    assert box.pair.second == "b" and box.count == 7 and isinstance(box.pair, Pair)
    expected = torch.ones(3) if is_copy else torch.full((3,), 3.0)
    assert all(torch.equal(value, expected) for value in (box.state["a"], box.pair.first, plain))
    assert kept[0] is memory  # of lists it knows nothing


def test_a_copy_shares_no_memory():
    box = Box({"a": torch.ones(2)}, Pair(torch.ones(2), "b"), 1)
    copy = copied(box)
    copy.state["a"].zero_()
    copy.pair.first.zero_()
    assert box.state["a"].all() and box.pair.first.all()
