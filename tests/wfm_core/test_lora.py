"""Adapters: nothing changes until they are trained, only they are trained, and merging keeps what they learnt."""

import pytest
import torch
from torch import nn

from wfm_core.lora import LowRank, add_lora, merge_lora


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = {"wide": nn.Linear(64, 96), "act": nn.Tanh(), "narrow": nn.Linear(96, 8), "new": nn.Linear(8, 2)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def test_an_adapter_is_a_sum_of_as_many_products_as_its_rank():
    adapter = LowRank(5, 7, 2)
    weight = torch.randn(5, 7)
    assert torch.equal(adapter(weight), weight)
    nn.init.normal_(adapter.up)
    torch.testing.assert_close(adapter(weight) - weight, adapter.up @ adapter.down)
    assert torch.linalg.matrix_rank(adapter(weight) - weight) == 2


def test_only_adapters_and_new_parts_are_trained_and_merging_changes_nothing():
    model, given = make_model(), torch.randn(3, 64)
    before, frozen = model(given), {name: value.clone() for name, value in model.state_dict().items()}
    assert add_lora(model, 4, ["new"]) == ["wide"]
    assert torch.equal(model(given), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = "wide.parametrizations.weight.0."
    assert trained == {adapter + "up", adapter + "down", "new.weight", "new.bias"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        model(given).square().sum().backward()
        optimizer.step()
    after = model(given)
    merge_lora(model)
    assert model.state_dict().keys() == frozen.keys()
    torch.testing.assert_close(model(given), after)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, frozen[name])}
    assert changed == {"wide.weight", "new.weight", "new.bias"}
    assert torch.linalg.matrix_rank(model.state_dict()["wide.weight"] - frozen["wide.weight"]) <= 4


def test_a_model_without_a_large_matrix_is_refused():
    with pytest.raises(ValueError, match="linear layer of 64"):
        add_lora(nn.Linear(8, 8), 4)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(make_model(), 0)
