"""Train policies on the successful demonstrations of recorded data sets.

    worldsim-train-policy data=[runs/demos] recipe=bc out=runs/policies/mine bc.num_demos=50
    worldsim-train-policy data=[runs/demos] recipe=wfm out=runs/policies/born wfm.num_demos=25
    worldsim-train-policy data=[runs/demos] recipe=act out=runs/policies/act act.encoder=bc_all_demos
    worldsim-train-policy data=[runs/demos] recipe=shipped out=runs/policies

`recipe` is bc, wfm (a network whose trunk is a world model's), act (LeRobot's ACT, trained by lerobot-train), the name
of a shipped policy, or shipped for all of those, one folder each below `out`. Interrupt it and start it again with the
same settings: it goes on where it stopped, and policies that are complete are left as they are.
"""

import difflib
import shlex
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from tqdm import tqdm

from policies.lerobot_train import ACTTrainConfig
from policies.recipes import SHIPPED, Recipe, train_policy
from policies.train import BCTrainConfig, CloneConfig, WFMTrainConfig
from worldsim.caches import open_caches
from worldsim.commands.entry import launch, register


@dataclass
class TrainPolicyCommand:
    """What to train.

    Attributes:
        data: folders of data sets, any format that `wfm_core.data.open_dataset` reads.
        recipe: bc, wfm, act, the name of a shipped policy, or shipped.
        out: the policy's folder; for `shipped` the folder of their folders.
        bc: settings of recipe=bc.
        wfm: settings of recipe=wfm.
        act: settings of recipe=act.
    """

    data: list[str] = field(default_factory=list)
    recipe: str = "bc"
    out: str = "runs/policies/bc"
    bc: BCTrainConfig = field(default_factory=BCTrainConfig)
    wfm: WFMTrainConfig = field(default_factory=WFMTrainConfig)
    act: ACTTrainConfig = field(default_factory=ACTTrainConfig)


def plan(command: TrainPolicyCommand) -> dict[Path, Recipe]:
    """Return what is to be trained: folder -> settings.

    Raises:
        ValueError: unknown recipe (the nearest is named), or settings given that this recipe does not use.
    """
    out = Path(command.out)
    given: dict[str, Recipe] = {"bc": command.bc, "wfm": command.wfm, "act": command.act}
    for name, settings in given.items():
        if command.recipe != name and settings != type(settings)():
            raise ValueError(f"{name}.* settings need recipe={name}, got recipe={command.recipe}")
    if command.recipe in given:
        return {out: given[command.recipe]}
    if command.recipe in SHIPPED:
        return {out: SHIPPED[command.recipe]}
    if command.recipe == "shipped":
        return {out / name: _with_trained_encoder(recipe, out) for name, recipe in SHIPPED.items()}
    known = [*given, "shipped", *SHIPPED]
    nearest = difflib.get_close_matches(command.recipe, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"recipe must be one of {', '.join(known)}, got {command.recipe!r}; nearest: {nearest!r}")


def run(command: TrainPolicyCommand) -> None:
    """Train what `plan` says, skipping what is complete (a folder with a card)."""
    torch.set_num_threads(1)
    line = shlex.join(["worldsim-train-policy", *sys.argv[1:]])
    recipes = plan(command)
    cache_dirs = [str(cache.directory) for cache in open_caches(command.data)]
    for position, (folder, recipe) in enumerate(recipes.items(), start=1):
        if (folder / "CARD.md").exists():
            print(f"[{position}/{len(recipes)}] {folder}: complete")
            continue
        if not command.data and isinstance(recipe, CloneConfig | ACTTrainConfig):
            raise ValueError("data must name at least one data set to learn from, for instance data=[runs/demos]")
        print(f"[{position}/{len(recipes)}] {folder}: {recipe}", flush=True)
        if isinstance(recipe, ACTTrainConfig):
            print(f"LeRobot's trainer writes to {folder}.run/train.log", flush=True)
        with tqdm(
            total=getattr(recipe, "num_steps", 0), unit="step", disable=not isinstance(recipe, CloneConfig)
        ) as bar:
            errors = train_policy(recipe, cache_dirs, folder, command=line, on_log=partial(_show, bar))
        print(f"[{position}/{len(recipes)}] {folder}: " + ", ".join(f"{k} {v:.3g}" for k, v in errors.items()))
    print(f"Policies: {', '.join(str(folder) for folder in recipes)}")


def _show(bar: tqdm, step: int, metrics: dict[str, float]) -> None:
    bar.update(step - bar.n)
    bar.set_postfix(loss=f"{metrics['loss']:.3f}")


def _with_trained_encoder(recipe: Recipe, out: Path) -> Recipe:
    """An ACT of the set sees through the encoder trained with the set, not through the one that ships."""
    if isinstance(recipe, ACTTrainConfig) and recipe.encoder in SHIPPED:
        return replace(recipe, encoder=str(out / recipe.encoder))
    return recipe


register("train_policy", TrainPolicyCommand, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="train_policy")
def main(config: Any) -> None:
    """Run the console script."""
    launch("train_policy", config, TrainPolicyCommand, run)


if __name__ == "__main__":
    main()
