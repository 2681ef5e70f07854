import json

import pytest

from policies import recipes
from policies.inverse_train import InverseTrainConfig
from policies.lerobot_train import ACTTrainConfig, DiffusionTrainConfig
from policies.recipes import SHIPPED, ScriptedConfig, train_policy
from policies.train import BCTrainConfig, WFMTrainConfig


def test_the_set_has_three_lineages_and_ten_members():
    kinds = [type(recipe) for recipe in SHIPPED.values()]
    assert len(kinds) >= 10
    assert set(kinds) == {BCTrainConfig, ACTTrainConfig, ScriptedConfig}


def test_what_a_recipe_needs_comes_before_it():
    names = list(SHIPPED)
    for name, recipe in SHIPPED.items():
        if isinstance(recipe, ACTTrainConfig):
            assert names.index(recipe.encoder) < names.index(name)


def test_a_scripted_policy_is_its_noise(tmp_path):
    assert train_policy(ScriptedConfig(0.4), [], tmp_path / "s", command="the command") == {}
    assert json.loads((tmp_path / "s" / "config.json").read_text()) == {"kind": "scripted", "noise": 0.4}
    assert "the command" in (tmp_path / "s" / "CARD.md").read_text()


@pytest.mark.parametrize(
    "recipe, trainer",
    [
        (BCTrainConfig(), "clone"),
        (WFMTrainConfig(), "clone"),
        (ACTTrainConfig(), "train_lerobot"),
        (DiffusionTrainConfig(), "train_lerobot"),
        (InverseTrainConfig(), "train_inverse_dynamics"),
    ],
)
def test_each_recipe_goes_to_its_trainer(monkeypatch, tmp_path, recipe, trainer):
    calls = []
    monkeypatch.setattr(recipes, trainer, lambda *args, **kwargs: calls.append(args) or {"error": 1.0})
    assert train_policy(recipe, ["cache"], tmp_path) == {"error": 1.0}
    assert calls == [(["cache"], tmp_path, recipe)]
