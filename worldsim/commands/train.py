"""Train a world model, one stage after the other, on recorded data sets.

    worldsim-train stage=tokenizer data=[runs/demos] out=runs/nano
    worldsim-train stage=dynamics  data=[runs/demos] out=runs/nano
    worldsim-train stage=heads     data=[runs/demos] out=runs/nano held_out=[runs/test]
    worldsim-train stage=tokenizer data=[runs/demos] out=runs/cv +tokenizer.kind=video +tokenizer.time_factor=8

    worldsim-train stage=decoder   data=[runs/demos] out=runs/nano                    (a sharper decoder, by diffusion)
    worldsim-train stage=ensemble  members=[a,b] out=runs/both held_out=[runs/test]   (disagreement as uncertainty)

Each stage adds its part to the checkpoint `out`/checkpoint, which then loads by that path. A killed run goes on from
its last checkpoint with the same learning curve. Settings of a part are given as, say, +dynamics.width=384; of the loop
as +train.num_steps=20000; of the losses of a tokenizer of kind video as +objective.gram_weight=0.1.
dry_run=true says what a run would take and trains nothing.

The Llama-style dynamics is trained in stages, each from the one before, the first from a tokenizer:

    worldsim-train stage=dynamics data=... init=bridge-nano-di16 clip_length=8 +dynamics.kind=transformer
        +dynamics.groups=1 +dynamics.num_draft_heads=3 out=runs/short         (short context)
    worldsim-train stage=dynamics data=... init=runs/short/checkpoint clip_length=16 +dynamics.window=16
        +dynamics.rope.extension=2 out=runs/long                              (longer context)
    worldsim-train stage=dynamics data=... init=runs/long/checkpoint clip_length=16 +dynamics.text_encoder=bytes
        image_every=4 out=runs/text                                           (text, and single frames among the clips)
    worldsim-train stage=dynamics data=... init=runs/text/checkpoint clip_length=16 image_every=4
        +train.anneal_fraction=1 out=runs/cool                                (cool-down to rate 0)

The diffusion dynamics likewise, over a continuous tokenizer:

    worldsim-train stage=dynamics data=... init=bridge-nano-diffusion clip_length=10 +dynamics.kind=diffusion
        +dynamics.patch=2 +dynamics.formulation=flow +dynamics.sampler=euler +dynamics.rope.trained_frames=64
        out=runs/base                                                         (clips with their episode's first frame)
    worldsim-train stage=dynamics data=[a] imagined=[a] init=runs/base/checkpoint clip_length=10
        out=runs/steady                                                       (its own rollouts, against drift)
    worldsim-train stage=dynamics data=... init=runs/steady/checkpoint clip_length=10 +dynamics.shortcut=0.25
        +dynamics.num_steps=2 out=runs/quick                                  (a student of few steps)

Several processes: accelerate launch --num_processes 8 -m worldsim.commands.train device=cuda +train.accumulate=8 ...
"""

from pathlib import Path
from typing import Any

import hydra
import torch

from wfm_core.checkpoint import (
    ENSEMBLE,
    build_config,
    build_tokenizer,
    read_config,
    save_weights,
    write_config,
)
from wfm_core.distributed import joined_processes
from wfm_core.memory import keep_freed_memory
from wfm_core.train import TrainConfig, compile_for_training, fit
from worldsim.caches import open_caches
from worldsim.commands.entry import launch, register, training_bar
from worldsim.heads_data import calibrate, put_together
from worldsim.training import KINDS, Stage, TrainCommand, part_of, prepare, tokenizer_of, with_settings_of_init
from worldsim.training_cost import describe, training_figures


def run(command: TrainCommand) -> Path:
    """Train one stage and write its part; returns the checkpoint's folder."""
    if command.threads:
        torch.set_num_threads(command.threads)
    keep_freed_memory()
    torch.manual_seed(command.seed)
    checkpoint = Path(command.out) / "checkpoint"
    if command.stage == ENSEMBLE:
        put_together(command.members, open_caches(command.held_out), checkpoint)
        return checkpoint
    command = with_settings_of_init(command)
    settings = build_config(TrainConfig, command.train, Path("train"))
    if command.dry_run:
        print(_dry_run(command, checkpoint, settings))
        return checkpoint
    with joined_processes(command.device) as processes:
        with processes.first():  # who comes later finds caches and tokens made
            made = prepare(command, checkpoint)
        bar, show = training_bar(settings.num_steps, command.stage, disable=processes.rank > 0)
        if command.compile:
            compile_for_training(made.trained)
        shaping = ("data", "action_free", "augmented", "augmented_fraction", "imagined", "init", "freeze")
        shaping += ("batch_size", "clip_length", "seed")
        made_of = {name: getattr(command, name) for name in shaping} | made.made_of
        made_of[command.stage] = made.config[command.stage]  # apart: the loop has a num_steps too
        run_dir = Path(command.out) / command.stage
        weights = fit(made.trained, made.batches, settings, run_dir, processes=processes, batches=made_of, on_log=show)
        bar.close()
        if processes.rank == 0:
            _add(command, checkpoint, made, weights)
            print(f"{command.stage}: {settings.num_steps} steps done; checkpoint in {checkpoint}")
    return checkpoint


def _add(command: TrainCommand, checkpoint: Path, made: Stage, weights: dict[str, torch.Tensor]) -> None:
    """Add the trained part to the checkpoint; `weights` are those of what was trained, which may hold more."""
    prefix = next(f"{name}." if name else "" for name, module in made.trained.named_modules() if module is made.part)
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    save_weights(checkpoint, command.stage, part)
    write_config(checkpoint, (read_config(checkpoint) if (checkpoint / "config.json").exists() else {}) | made.config)
    if command.stage == "heads":
        limits = calibrate(checkpoint, open_caches(command.held_out))
        write_config(checkpoint, read_config(checkpoint) | {"calibration": limits})


def _dry_run(command: TrainCommand, checkpoint: Path, settings: TrainConfig) -> str:
    """Say what training would take."""
    if command.stage == "tokenizer":
        with torch.device("meta"):
            part, _ = build_tokenizer(command.tokenizer, Path("tokenizer"))
    else:
        # A transformer or diffusion model of any size can be looked at before there is a tokenizer for it.
        sized = command.stage == "dynamics" and command.kind != KINDS[0]
        tokenizer = None if sized and not (checkpoint / "config.json").exists() else tokenizer_of(command, checkpoint)
        cls, config = part_of(command, tokenizer)
        with torch.device("meta"):
            part = cls(config)
    sizes = {"batch_size": command.batch_size, "clip_length": command.clip_length}
    return describe(training_figures(part, settings, **sizes, fused=command.device == "cuda"))


register("train", TrainCommand, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(config: Any) -> None:
    """Run the console script."""
    launch("train", config, TrainCommand, run)


if __name__ == "__main__":
    main()
