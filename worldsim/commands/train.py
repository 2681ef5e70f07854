"""Train a world model, one stage after the other, on recorded data sets.

    worldsim-train stage=tokenizer data=[runs/demos] out=runs/nano
    worldsim-train stage=dynamics  data=[runs/demos] out=runs/nano
    worldsim-train stage=heads     data=[runs/demos] out=runs/nano held_out=[runs/test]

Each stage adds its part to the checkpoint `out`/checkpoint, which then loads by that path. A killed run goes on from
its last checkpoint with the same learning curve. Settings of a part are given as, say, +dynamics.width=384; of the loop
as +train.num_steps=20000. dry_run=true says what a run would take and trains nothing.

The Llama-style dynamics is trained in stages, each from the one before:

    worldsim-train stage=dynamics +dynamics.kind=transformer +dynamics.preset=nano clip_length=8 data=... out=runs/short
    ... init=runs/short/checkpoint clip_length=16 +dynamics.rope.extension=2 out=runs/long        (longer context)
    ... init=runs/long/checkpoint +dynamics.text_encoder=bytes images=0.25 out=runs/text          (text, single frames)
    ... init=runs/text/checkpoint +train.anneal_fraction=1 out=runs/cool                          (cool-down to rate 0)

Several processes: accelerate launch --num_processes 8 -m worldsim.commands.train device=cuda +train.accumulate=8 ...
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from tqdm import tqdm

from tasks import TASKS
from wfm_core.batches import DynamicsBatches, TokenClipBatches, TokenizerBatches, check_size, encode_cache
from wfm_core.checkpoint import (
    as_json,
    build_config,
    find_checkpoint,
    load_tokenizer,
    load_weights,
    read_config,
    read_part,
    save_weights,
    write_config,
)
from wfm_core.data import open_dataset
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.distributed import joined_processes
from wfm_core.memory import keep_freed_memory
from wfm_core.models.autoregressive import AutoregressiveConfig, AutoregressiveModel
from wfm_core.models.text import load_text_encoder
from wfm_core.models.transformer import Transformer
from wfm_core.models.transformer_config import NEW_PARTS, TransformerConfig
from wfm_core.presets import transformer_from_preset
from wfm_core.rollouts import keep_imagined
from wfm_core.tokenizers.discrete import DiscreteTokenizer, DiscreteTokenizerConfig
from wfm_core.train import BatchFn, TrainConfig, fit
from worldsim.commands.entry import launch, register
from worldsim.dynamics_data import contacts, watched_cells
from worldsim.heads import Heads, HeadsConfig
from worldsim.heads_data import HeadsBatches, calibrate
from worldsim.training_cost import describe, training_figures

STAGES = ("tokenizer", "dynamics", "heads")
KINDS = ("autoregressive", "transformer")


@dataclass
class TrainCommand:
    """What to train.

    Attributes:
        stage: "tokenizer", "dynamics" or "heads"; a later stage needs the earlier ones' parts in the checkpoint.
        data: folders of data sets, any format that `wfm_core.data.open_dataset` reads.
        held_out: data sets on which the heads' thresholds are set; needed by that stage.
        imagined: data sets that are seen once more as the checkpoint's own dynamics imagines them: the heads learn to
            judge such frames, the dynamics (of `init`) to come back to what is real.
        out: run folder; the checkpoint is `out`/checkpoint.
        init: a checkpoint, by shipped name or folder, whose weights of this part to start from; "" for random ones. Its
            tokenizer comes along where `out` has none.
        batch_size: frames (tokenizer, heads) or clips (dynamics) of a batch.
        clip_length: frames of a dynamics clip.
        images: share of the batches that hold single frames; for dynamics.kind=transformer.
        seed: of initial weights and batches.
        freeze: prefixes of the parameters to keep as they are, for instance [encoder] so that tokens stay the same.
        threads: torch threads; 0 leaves torch's choice.
        device: "cpu" or "cuda".
        dry_run: say what the run would take in parameters, memory and operations, and do nothing.
        compile: compile the model first (minutes), then train about a quarter faster; needs a C++ compiler on a CPU.
        tokenizer, dynamics, heads, train: settings of the parts and of the loop that differ from their defaults.
            dynamics.kind is "autoregressive" (the default) or "transformer", which takes dynamics.preset, a size.
    """

    stage: str = "tokenizer"
    data: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    imagined: list[str] = field(default_factory=list)
    out: str = "runs/world_model"
    init: str = ""
    batch_size: int = 16
    clip_length: int = 17
    images: float = 0.0
    seed: int = 0
    freeze: list[str] = field(default_factory=list)
    threads: int = 0
    device: str = "cpu"
    dry_run: bool = False
    compile: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)
    dynamics: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {self.stage!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if not self.data and not self.dry_run:
            raise ValueError("data must name at least one data set, for instance data=[runs/demos]")
        if self.stage == "dynamics" and self.kind not in KINDS:
            raise ValueError(f"dynamics.kind must be one of {KINDS}, got {self.kind!r}")
        if not 0 <= self.images <= 1:
            raise ValueError(f"images must lie in [0, 1], got {self.images}")
        if self.images and self.kind != "transformer":
            raise ValueError(f"images={self.images} needs dynamics.kind=transformer, got {self.kind!r}")
        if self.stage == "dynamics" and self.imagined and self.kind == "transformer":
            raise ValueError("imagined=[...] needs dynamics.kind=autoregressive, got 'transformer'")
        if self.stage == "dynamics" and self.imagined and not self.init:
            raise ValueError("stage=dynamics imagined=[...] needs init=<checkpoint>, whose dynamics imagines them")
        if self.stage == "heads" and not self.held_out:
            raise ValueError("stage=heads needs held_out=[...], data sets on which thresholds are set")

    @property
    def kind(self) -> str:
        """Of the dynamics."""
        return self.dynamics.get("kind", "autoregressive")


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
    settings = build_config(TrainConfig, command.train, Path("train"))
    if command.dry_run:
        fused = command.device == "cuda"
        sizes = {"batch_size": command.batch_size, "clip_length": command.clip_length, "fused": fused}
        print(describe(training_figures(*_part(command, checkpoint), settings, **sizes)))
        return checkpoint
    with joined_processes(command.device) as processes:
        with processes.first():
            caches = open_caches(command.data)
            if command.init and command.stage != "tokenizer":
                _take_tokenizer(find_checkpoint(command.init), checkpoint)
            stage = {"tokenizer": _tokenizer_stage, "dynamics": _dynamics_stage, "heads": _heads_stage}[command.stage]
            model, batches, config = stage(command, checkpoint, caches)
        if command.init:
            new = NEW_PARTS if isinstance(model, Transformer) else ()
            load_weights(model, find_checkpoint(command.init), command.stage, new=new)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(command.freeze)))
        bar = tqdm(total=settings.num_steps, desc=command.stage, disable=processes.rank > 0)

        def show(step: int, row: dict[str, float]) -> None:
            bar.update(step - bar.n)
            bar.set_postfix({name: f"{value:.4g}" for name, value in row.items()})

        if command.compile:
            model.compile()
        shaping = ("data", "imagined", "init", "freeze", "batch_size", "clip_length", "images", "seed")
        made_of = {name: getattr(command, name) for name in shaping} | config[command.stage]
        folder = Path(command.out) / command.stage
        weights = fit(model, batches, settings, folder, processes=processes, batches=made_of, on_log=show)
        bar.close()
        if processes.rank == 0:
            _write(command, checkpoint, weights, config)
            print(f"{command.stage}: {settings.num_steps} steps done; checkpoint in {checkpoint}")
    return checkpoint


def _write(command: TrainCommand, checkpoint: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Add the trained part to the checkpoint."""
    save_weights(checkpoint, command.stage, weights)
    write_config(checkpoint, (read_config(checkpoint) if (checkpoint / "config.json").exists() else {}) | config)
    if command.stage == "heads":
        limits = calibrate(checkpoint, open_caches(command.held_out))
        write_config(checkpoint, read_config(checkpoint) | {"calibration": limits})


def _take_tokenizer(source: Path, checkpoint: Path) -> None:
    """Begin a checkpoint with the tokenizer of another, unless it has one."""
    if (checkpoint / "config.json").exists():
        return
    made = read_part(source, "tokenizer")
    checkpoint.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "tokenizer.safetensors", checkpoint / "tokenizer.safetensors")
    write_config(checkpoint, {"tokenizer": made})


Stage = tuple[torch.nn.Module, BatchFn, dict[str, Any]]


def _part(command: TrainCommand, checkpoint: Path) -> tuple[type[torch.nn.Module], Any]:
    """Class and configuration of the part to train; the dynamics and the heads follow the checkpoint's tokenizer."""
    if command.stage == "tokenizer":
        return DiscreteTokenizer, build_config(DiscreteTokenizerConfig, command.tokenizer, Path("tokenizer"))
    if command.kind == "transformer" and command.dry_run and not (checkpoint / "config.json").exists():
        # Any size can be looked at before there is a tokenizer for it.
        return Transformer, transformer_from_preset(command.dynamics, None, command.clip_length)
    made = read_part(checkpoint, "tokenizer")
    grid, levels = made["image_size"] // made["patch"], made["levels"]
    if command.stage == "heads":
        instructions = tuple(task.instruction for task in TASKS.values())
        shared = {"instructions": instructions, "latent_shape": (grid, grid, len(levels))}
        return Heads, build_config(HeadsConfig, shared | command.heads, Path("heads"))
    if command.kind == "transformer":
        return Transformer, transformer_from_preset(command.dynamics, made, command.clip_length)
    shared = {"levels": levels, "grid": grid}
    return AutoregressiveModel, build_config(AutoregressiveConfig, shared | command.dynamics, Path("dynamics"))


def _tokenizer_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    _, config = _part(command, checkpoint)
    for cache in caches:
        check_size(cache, config.image_size)
    model = DiscreteTokenizer(config)
    model.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  # torch's stubs lack this form
    return model, TokenizerBatches(caches, command.batch_size, command.seed), {"tokenizer": as_json(config)}


def _tokens(checkpoint: Path, caches: list[ClipCache]) -> list[np.ndarray]:
    """The caches' tokens under the checkpoint's tokenizer, encoded on first use."""
    tokenizer = load_tokenizer(checkpoint)
    return [encode_cache(tokenizer, cache) for cache in caches]


def _dynamics_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    _, config = _part(command, checkpoint)
    sizes = {"clip_length": command.clip_length, "batch_size": command.batch_size, "seed": command.seed}
    made = {"kind": command.kind, "dynamics": as_json(config)}
    if isinstance(config, TransformerConfig):
        reads = load_text_encoder(config.text_encoder) if config.text_encoder else None
        clips = TokenClipBatches(
            caches, _tokens(checkpoint, caches), **sizes, text_encoder=reads, images=command.images
        )
        return Transformer(config), clips, made
    again = open_caches(command.imagined)
    num_filmed, caches = len(caches), caches + again
    real, contact = _tokens(checkpoint, caches), [contacts(cache) for cache in caches]
    to_imagine = list(zip(caches, real, contact, strict=True))[num_filmed:]
    imagined = [None] * num_filmed + [keep_imagined(find_checkpoint(command.init), *given) for given in to_imagine]
    batches = DynamicsBatches(
        caches,
        real,
        **sizes,
        watched=[watched_cells(cache, config.grid) for cache in caches],
        contact=contact,
        imagined=imagined,
    )
    return AutoregressiveModel(config), batches, made


def _heads_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer = load_tokenizer(checkpoint)
    _, config = _part(command, checkpoint)
    model = Heads(config)
    tokens = _tokens(checkpoint, caches)
    again = open_caches(command.imagined)
    imagined = [
        keep_imagined(checkpoint, cache, seen, contacts(cache))
        for cache, seen in zip(again, _tokens(checkpoint, again), strict=True)
    ]
    return (
        model,
        HeadsBatches(model, tokenizer.fsq, caches + again, tokens + imagined, command.batch_size, command.seed),
        {"heads": as_json(config)},
    )


register("train", TrainCommand, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(config: Any) -> None:
    """Run the console script."""
    launch("train", config, TrainCommand, run)


if __name__ == "__main__":
    main()
