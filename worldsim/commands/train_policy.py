"""Train policies on the successful demonstrations of recorded data sets.

    worldsim-train-policy data=[runs/demos] recipe=bc out=runs/policies/mine bc.num_demos=50
    worldsim-train-policy data=[runs/demos] recipe=wfm out=runs/policies/born wfm.num_demos=25
    worldsim-train-policy data=[runs/demos] recipe=act out=runs/policies/act act.encoder=bc_all_demos
    worldsim-train-policy data=[runs/demos] recipe=shipped out=runs/policies
    worldsim-train-policy data=[runs/demos] recipe=inverse_dynamics out=runs/inverse
    worldsim-train-policy data=[runs/demos] recipe=reinforce out=runs/policies/better reinforce.start=bc_10_demos \
        'reinforce.tasks=[push_cube]' reinforce.twin_probe=true
    worldsim-train-policy recipe=sb3 out=runs/policies/ppo 'sb3.tasks=[reach_target]' sb3.starts=initial

`recipe` is bc, wfm (a network whose trunk is a world model's), act or diffusion (LeRobot's, trained by lerobot-train),
the name of a shipped policy, or shipped for all of those, one folder each below `out`; or inverse_dynamics, which infer
actions from video, for worldsim-convert actions_by=<folder> to make demonstrations of it. Three recipes learn by trial
and error in imagination alone, from moments of the recordings (or, with starts=initial, without any): reinforce goes on
from a policy, sb3 and torchrl have the PPO of Stable-Baselines3 or TorchRL begin from nothing.
Interrupt it and start it again with the same settings: it goes on where it stopped, and policies that are complete are
left as they are.
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

from policies.inverse_train import InverseTrainConfig
from policies.lerobot_train import ACTTrainConfig, DiffusionTrainConfig, LeRobotTrainConfig
from policies.recipes import SHIPPED, Recipe, ScriptedConfig, train_policy
from policies.train import BCTrainConfig, CloneConfig, WFMTrainConfig
from worldsim.caches import open_caches
from worldsim.commands.entry import launch, register
from worldsim.commands.imagination import (
    FROM_DATA,
    Command,
    ReinforceCommand,
    SB3Command,
    TorchRLCommand,
    train_in_imagination,
)


@dataclass
class TrainPolicyCommand:
    """What to train.

    Attributes:
        data: folders of data sets, any format that `wfm_core.data.open_dataset` reads.
        recipe: bc, wfm, act, diffusion, inverse_dynamics, reinforce, sb3, torchrl, the name of a shipped policy, or
            shipped.
        out: the policy's folder; for `shipped` the folder of their folders.
        bc: settings of recipe=bc.
        wfm: settings of recipe=wfm.
        act: settings of recipe=act.
        diffusion: settings of recipe=diffusion.
        inverse_dynamics: settings of recipe=inverse_dynamics.
        reinforce: settings of recipe=reinforce.
        sb3: settings of recipe=sb3.
        torchrl: settings of recipe=torchrl.
    """

    data: list[str] = field(default_factory=list)
    recipe: str = "bc"
    out: str = "runs/policies/bc"
    bc: BCTrainConfig = field(default_factory=BCTrainConfig)
    wfm: WFMTrainConfig = field(default_factory=WFMTrainConfig)
    act: ACTTrainConfig = field(default_factory=ACTTrainConfig)
    diffusion: DiffusionTrainConfig = field(default_factory=DiffusionTrainConfig)
    inverse_dynamics: InverseTrainConfig = field(default_factory=InverseTrainConfig)
    reinforce: ReinforceCommand = field(default_factory=ReinforceCommand)
    sb3: SB3Command = field(default_factory=SB3Command)
    torchrl: TorchRLCommand = field(default_factory=TorchRLCommand)


def plan(command: TrainPolicyCommand) -> dict[Path, Recipe | Command]:
    """Return what is to be trained: folder -> settings.

    Raises:
        ValueError: unknown recipe (the nearest is named), or settings given that this recipe does not use.
    """
    out = Path(command.out)
    names = ("bc", "wfm", "act", "diffusion", "inverse_dynamics", "reinforce", "sb3", "torchrl")
    given = {name: getattr(command, name) for name in names}
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
    caches = open_caches(command.data)
    cache_dirs = [str(cache.directory) for cache in caches]
    for position, (folder, recipe) in enumerate(recipes.items(), start=1):
        if (folder / "CARD.md").exists():
            print(f"[{position}/{len(recipes)}] {folder}: complete")
            continue
        from_data = CloneConfig | LeRobotTrainConfig | InverseTrainConfig
        needed = isinstance(recipe, from_data) or getattr(recipe, "starts", "") in FROM_DATA
        if not command.data and needed:
            raise ValueError("data must name at least one data set to learn from, for instance data=[runs/demos]")
        print(f"[{position}/{len(recipes)}] {folder}: {recipe}", flush=True)
        if isinstance(recipe, LeRobotTrainConfig):
            print(f"LeRobot's trainer writes to {folder}.run/train.log", flush=True)
        with tqdm(total=_length(recipe), disable=isinstance(recipe, LeRobotTrainConfig | ScriptedConfig)) as bar:
            show = partial(_show, bar)
            if isinstance(recipe, ReinforceCommand | SB3Command | TorchRLCommand):
                found = train_in_imagination(recipe, caches, folder, line=line, on_update=show)
            else:
                found = train_policy(recipe, cache_dirs, folder, command=line, on_log=show)
        print(f"[{position}/{len(recipes)}] {folder}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
    print(f"Policies: {', '.join(str(folder) for folder in recipes)}")


def _length(recipe: Recipe | Command) -> int:
    """How many updates or steps a training has, as far as it tells."""
    if isinstance(recipe, ReinforceCommand):
        return recipe.rl.num_updates
    if isinstance(recipe, SB3Command | TorchRLCommand):
        return recipe.ppo.num_steps
    return getattr(recipe, "num_steps", 0)


def _show(bar: tqdm, step: int, metrics: dict[str, float]) -> None:
    bar.update(step - bar.n)
    shown = ("loss", "rollout_success", "success")
    bar.set_postfix({name: f"{metrics[name]:.3f}" for name in shown if name in metrics})


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
