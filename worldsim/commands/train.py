"""Train a world model, one stage after the other, on recorded data sets.

    worldsim-train stage=tokenizer data=[runs/demos] out=runs/nano
    worldsim-train stage=dynamics  data=[runs/demos] out=runs/nano
    worldsim-train stage=heads     data=[runs/demos] out=runs/nano held_out=[runs/test]
    worldsim-train stage=tokenizer data=[runs/demos] out=runs/cv +tokenizer.kind=video +tokenizer.time_factor=8

Each stage adds its part to the checkpoint `out`/checkpoint, which then loads by that path. A killed run goes on from
its last checkpoint with the same learning curve. Settings of a part are given as, say, +dynamics.width=384; of the loop
as +train.num_steps=20000; of the losses of a tokenizer of kind video as +objective.gram_weight=0.1.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from tqdm import tqdm

from tasks import TASKS
from wfm_core.batches import DynamicsBatches, TokenizerBatches, VideoBatches, check_size, encode_cache
from wfm_core.checkpoint import (
    as_json,
    build_config,
    build_tokenizer,
    find_checkpoint,
    load_patch_tokenizer,
    load_weights,
    read_config,
    save_weights,
    write_config,
)
from wfm_core.data import open_dataset
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.memory import keep_freed_memory
from wfm_core.models.autoregressive import AutoregressiveConfig, AutoregressiveModel
from wfm_core.rollouts import keep_imagined
from wfm_core.tokenizers.objective import ReconstructionConfig, ReconstructionObjective
from wfm_core.tokenizers.video import VideoTokenizer
from wfm_core.train import BatchFn, TrainConfig, fit
from worldsim.commands.entry import launch, register
from worldsim.dynamics_data import contacts, watched_cells
from worldsim.heads import Heads, HeadsConfig
from worldsim.heads_data import HeadsBatches, calibrate

STAGES = ("tokenizer", "dynamics", "heads")


@dataclass
class TrainCommand:
    """What to train.

    Attributes:
        stage: "tokenizer", "dynamics" or "heads"; a later stage needs the earlier ones' parts in the checkpoint.
        data: folders of data sets, any format that `wfm_core.data.open_dataset` reads; a folder of plain videos will
            do for a tokenizer.
        held_out: data sets on which the heads' thresholds are set; needed by that stage.
        imagined: data sets that are seen once more as the checkpoint's own dynamics imagines them: the heads learn to
            judge such frames, the dynamics (of `init`) to come back to what is real.
        out: run folder; the checkpoint is `out`/checkpoint.
        init: a checkpoint, by shipped name or folder, whose weights of this part to start from; "" for random ones.
        batch_size: frames (tokenizer of kind patch, heads) or clips (tokenizer of kind video, dynamics) of a batch.
        clip_length: frames of a clip.
        image_every: for a tokenizer of kind video every so many batches one of single frames; 0 for none.
        augment: for a tokenizer of kind video, crop, mirror and brighten clips.
        seed: of initial weights and batches.
        freeze: prefixes of the parameters to keep as they are, for instance [encoder] so that tokens stay the same.
        threads: torch threads; 0 leaves torch's choice.
        compile: compile the model first (minutes), then train about a quarter faster; needs a C++ compiler on a CPU.
        tokenizer, dynamics, heads, train: settings of the parts and of the loop that differ from their defaults.
            tokenizer.kind is "patch", which a world model needs, or "video".
        objective: losses of a tokenizer of kind video that differ from their defaults.
    """

    stage: str = "tokenizer"
    data: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    imagined: list[str] = field(default_factory=list)
    out: str = "runs/world_model"
    init: str = ""
    batch_size: int = 16
    clip_length: int = 17
    image_every: int = 2
    augment: bool = False
    seed: int = 0
    freeze: list[str] = field(default_factory=list)
    threads: int = 0
    compile: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)
    dynamics: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {self.stage!r}")
        if not self.data:
            raise ValueError("data must name at least one data set, for instance data=[runs/demos]")
        if self.stage == "dynamics" and self.imagined and not self.init:
            raise ValueError("stage=dynamics imagined=[...] needs init=<checkpoint>, whose dynamics imagines them")
        if self.stage == "heads" and not self.held_out:
            raise ValueError("stage=heads needs held_out=[...], data sets on which thresholds are set")


def open_caches(folders: Sequence[str]) -> list[ClipCache]:
    """Open the clip cache beside each data set, building it on first use; a cache also does without its data set.

    Raises:
        ValueError: no data set, or one that has changed since its cache was built.
    """
    caches = []
    for folder in map(Path, folders):
        directory = folder.with_name(folder.name + ".cache")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = "".join(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n" for path in files)
        fingerprint = hashlib.sha256(sizes.encode()).hexdigest()
        if not directory.exists():
            episodes = open_dataset(folder)
            progress = tqdm(episodes, total=len(episodes), desc=f"decoding {folder}")
            build_clip_cache(progress, directory, fingerprint=fingerprint)
        cache = ClipCache(directory)
        if files and cache.fingerprint not in ("", fingerprint):
            raise ValueError(f"{folder} must be as when {directory} was built, but has changed; delete {directory}")
        caches.append(cache)
    return caches


def run(command: TrainCommand) -> Path:
    """Train one stage and write its part; returns the checkpoint's folder."""
    if command.threads:
        torch.set_num_threads(command.threads)
    keep_freed_memory()
    torch.manual_seed(command.seed)
    checkpoint = Path(command.out) / "checkpoint"
    caches = open_caches(command.data)
    if command.stage != "tokenizer":
        for cache in [*caches, *open_caches(command.imagined), *open_caches(command.held_out)]:
            cache.require_actions()
    settings = build_config(TrainConfig, command.train, Path("train"))
    stage = {"tokenizer": _tokenizer_stage, "dynamics": _dynamics_stage, "heads": _heads_stage}[command.stage]
    made = stage(command, checkpoint, caches)
    if command.init:
        load_weights(made.part, find_checkpoint(command.init), command.stage)
    for name, parameter in made.part.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(command.freeze)))
    bar = tqdm(total=settings.num_steps, desc=command.stage)

    def show(step: int, row: dict[str, float]) -> None:
        bar.update(step - bar.n)
        bar.set_postfix({name: f"{value:.4g}" for name, value in row.items()})

    if command.compile:
        made.trained.compile()
    shaping = ("data", "imagined", "init", "freeze", "batch_size", "clip_length", "seed")
    made_of = {name: getattr(command, name) for name in shaping} | made.config[command.stage] | made.made_of
    run_dir = Path(command.out) / command.stage
    made.trained.load_state_dict(fit(made.trained, made.batches, settings, run_dir, batches=made_of, on_log=show))
    bar.close()
    save_weights(checkpoint, command.stage, made.part.state_dict())
    write_config(checkpoint, (read_config(checkpoint) if (checkpoint / "config.json").exists() else {}) | made.config)
    if command.stage == "heads":
        limits = calibrate(checkpoint, open_caches(command.held_out))
        write_config(checkpoint, read_config(checkpoint) | {"calibration": limits})
    print(f"{command.stage}: {settings.num_steps} steps done; checkpoint in {checkpoint}")
    return checkpoint


@dataclass(frozen=True)
class Stage:
    """What a stage trains.

    Attributes:
        part: what it adds to the checkpoint.
        trained: maps a batch to (loss, metrics); the part, or an objective that holds it.
        batches: what it is trained on.
        config: what it adds to `config.json`.
        made_of: further settings that shape the learning curve.
    """

    part: torch.nn.Module
    trained: torch.nn.Module
    batches: BatchFn
    config: dict[str, Any]
    made_of: dict[str, Any] = field(default_factory=dict)


def _tokenizer_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer, values = build_tokenizer(command.tokenizer, Path("tokenizer"))
    if isinstance(tokenizer, VideoTokenizer):
        return _video_tokenizer_stage(command, caches, tokenizer, values)
    if command.objective or command.augment:
        raise ValueError(f"objective and augment need tokenizer.kind=video, got {values['kind']!r}")
    for cache in caches:
        check_size(cache, tokenizer.config.image_size)
    tokenizer.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  # torch's stubs lack this form
    batches = TokenizerBatches(caches, command.batch_size, command.seed)
    return Stage(tokenizer, tokenizer, batches, {"tokenizer": values})


def _video_tokenizer_stage(
    command: TrainCommand, caches: list[ClipCache], tokenizer: VideoTokenizer, values: dict[str, Any]
) -> Stage:
    config = build_config(ReconstructionConfig, command.objective, Path("objective"))
    height, width = caches[0].frames.shape[1:3]
    tokenizer.config.check_clip(command.clip_length, height, width)
    of_batches = {"image_every": command.image_every, "augment": command.augment}
    batches = VideoBatches(
        caches, clip_length=command.clip_length, batch_size=command.batch_size, seed=command.seed, **of_batches
    )
    made_of = {"objective": as_json(config), **of_batches}
    return Stage(tokenizer, ReconstructionObjective(tokenizer, config), batches, {"tokenizer": values}, made_of)


def _tokens(checkpoint: Path, caches: list[ClipCache]) -> list[np.ndarray]:
    """The caches' tokens under the checkpoint's tokenizer, encoded on first use."""
    tokenizer = load_patch_tokenizer(checkpoint)
    return [encode_cache(tokenizer, cache) for cache in caches]


def _dynamics_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer = load_patch_tokenizer(checkpoint)
    shared = {"levels": tokenizer.config.levels, "grid": tokenizer.grid}
    config = build_config(AutoregressiveConfig, shared | command.dynamics, Path("dynamics"))
    again = open_caches(command.imagined)
    num_filmed, caches = len(caches), caches + again
    real, contact = _tokens(checkpoint, caches), [contacts(cache) for cache in caches]
    to_imagine = list(zip(caches, real, contact, strict=True))[num_filmed:]
    imagined = [None] * num_filmed + [keep_imagined(find_checkpoint(command.init), *given) for given in to_imagine]
    batches = DynamicsBatches(
        caches,
        real,
        clip_length=command.clip_length,
        batch_size=command.batch_size,
        seed=command.seed,
        watched=[watched_cells(cache, config.grid) for cache in caches],
        contact=contact,
        imagined=imagined,
    )
    model = AutoregressiveModel(config)
    return Stage(model, model, batches, {"kind": "autoregressive", "dynamics": as_json(config)})


def _heads_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer = load_patch_tokenizer(checkpoint)
    shared = {
        "instructions": tuple(task.instruction for task in TASKS.values()),
        "latent_shape": tokenizer.latent_shape,
    }
    config = build_config(HeadsConfig, shared | command.heads, Path("heads"))
    model = Heads(config)
    tokens = _tokens(checkpoint, caches)
    again = open_caches(command.imagined)
    imagined = [
        keep_imagined(checkpoint, cache, seen, contacts(cache))
        for cache, seen in zip(again, _tokens(checkpoint, again), strict=True)
    ]
    batches = HeadsBatches(model, tokenizer.fsq, caches + again, tokens + imagined, command.batch_size, command.seed)
    return Stage(model, model, batches, {"heads": as_json(config)})


register("train", TrainCommand, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(config: Any) -> None:
    """Run the console script."""
    launch("train", config, TrainCommand, run)


if __name__ == "__main__":
    main()
