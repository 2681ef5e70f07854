"""What a stage of training trains, and on what: settings of `worldsim-train`, and the parts and batches they mean."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks import TASKS
from wfm_core.batches import DecoderBatches
from wfm_core.checkpoint import (
    ENSEMBLE,
    as_json,
    build_config,
    build_tokenizer,
    copy_part,
    find_checkpoint,
    load_patch_tokenizer,
    load_weights,
    read_config,
    read_part,
    wherever,
)
from wfm_core.data.clip_cache import ClipCache
from wfm_core.encoding import encode_cache, latent_statistics
from wfm_core.models.autoregressive import Autoregressive, AutoregressiveConfig
from wfm_core.models.diffusion import Diffusion
from wfm_core.models.diffusion_decoder import DiffusionDecoderConfig, LatentDenoiser
from wfm_core.models.irasim import Irasim, IrasimConfig
from wfm_core.models.transformer import Transformer
from wfm_core.models.transformer_config import NEW_PARTS
from wfm_core.presets import diffusion_config, transformer_from_preset
from wfm_core.rollouts import keep_imagined
from wfm_core.tokenizers.batches import Mixture, TokenizerBatches, VideoBatches, check_size
from wfm_core.tokenizers.objective import ReconstructionConfig, ReconstructionObjective
from wfm_core.tokenizers.patch import PatchTokenizer
from wfm_core.tokenizers.video import VideoTokenizer
from wfm_core.train import BatchFn
from worldsim.caches import open_caches
from worldsim.dynamics_data import contacts, dynamics_batches
from worldsim.heads import Heads, HeadsConfig
from worldsim.heads_data import HeadsBatches

STAGES = ("tokenizer", "dynamics", "heads", "decoder", ENSEMBLE)
KINDS = ("autoregressive", "transformer", "diffusion", "irasim")  # of dynamics
OF_LATENTS = KINDS[2:]  # which need a continuous tokenizer
SELF_FORCED = ("autoregressive", "diffusion")  # which can learn from what they imagined


@dataclass
class TrainCommand:
    """What to train.

    Attributes:
        stage: "tokenizer", "dynamics", "heads" or "decoder", a diffusion decoder of a discrete tokenizer; a later stage
            needs the parts in the checkpoint that it reads, all the tokenizer, the heads also the dynamics. "ensemble"
            trains nothing: the checkpoint is one of the `members` together.
        data: folders of data sets, any format that `wfm_core.data.open_dataset` reads; a folder of plain videos will
            do for a tokenizer.
        held_out: data sets on which the heads' thresholds, or those of an ensemble, are set; needed by these stages.
        members: of an ensemble, checkpoints by name or folder, one of which may come several times; they share a
            tokenizer, and the first one's frames and heads are the ensemble's.
        imagined: data sets that are seen once more as the checkpoint's own dynamics imagines them: the heads learn to
            judge such frames, the dynamics (of `init`) to come back to what is real.
        out: run folder; the checkpoint is `out`/checkpoint.
        init: a checkpoint, by shipped name or folder, whose weights and settings of this part to start from; "" for
            random and default ones. Its tokenizer comes along where `out` has none; one that has only a tokenizer, as
            bridge-nano-di16, gives that.
        batch_size: of a batch, frames (tokenizer of kind patch, heads, decoder) or clips (tokenizer of kind video,
            dynamics).
        clip_length: frames of a clip.
        image_every: every so many batches one of single frames, 0 for none; for a tokenizer of kind video (2 if not
            given) and for a dynamics of kind transformer or diffusion (0).
        crop: side in pixels of the square that a tokenizer of kind video sees of each clip; 0 for all of it.
        augmented: further data sets for a tokenizer, which it sees cropped, mirrored and brightened.
        augmented_fraction: share of the samples that come from these.
        seed: of initial weights and batches.
        freeze: prefixes of the parameters to keep as they are, for instance [encoder] so that tokens stay the same.
        threads: torch threads; 0 leaves torch's choice.
        device: "cpu" or "cuda".
        action_free: learn dynamics from frames alone, of data sets that have no actions or whose actions are hidden;
            for dynamics of kind autoregressive or diffusion, which `worldsim-posttrain` then teaches what actions do.
        dry_run: say what the run would take in parameters, memory and operations, and do nothing.
        compile: compile the model first (minutes), then train about a quarter faster; needs a C++ compiler on a CPU.
        tokenizer, dynamics, heads, decoder, train: settings of the parts and of the loop that differ from the defaults
            or, for a part that starts from `init`, from its own.
            tokenizer.kind is "patch", which a world model needs, or "video"; dynamics.kind is "autoregressive",
            "transformer", which also takes dynamics.preset, its size, "diffusion", for a continuous tokenizer, or
            "irasim", likewise, a baseline to compare with.
        objective: losses of a tokenizer of kind video that differ from their defaults.
    """

    stage: str = "tokenizer"
    data: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    imagined: list[str] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    out: str = "runs/world_model"
    init: str = ""
    batch_size: int = 16
    clip_length: int = 17
    image_every: int | None = None
    crop: int = 0
    augmented: list[str] = field(default_factory=list)
    augmented_fraction: float = 0.2
    seed: int = 0
    freeze: list[str] = field(default_factory=list)
    threads: int = 0
    device: str = "cpu"
    action_free: bool = False
    dry_run: bool = False
    compile: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)
    dynamics: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {self.stage!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.kind not in KINDS:
            raise ValueError(f"dynamics.kind must be one of {KINDS}, got {self.kind!r}")
        if self.stage == "dynamics" and self.imagined and self.kind not in SELF_FORCED:
            raise ValueError(f"imagined=[...] needs dynamics.kind to be one of {SELF_FORCED}, got {self.kind!r}")
        if self.action_free and (self.stage != "dynamics" or self.kind not in SELF_FORCED):
            raise ValueError(f"action_free=true needs stage=dynamics and dynamics.kind to be one of {SELF_FORCED}")
        if self.augmented and self.stage != "tokenizer":
            raise ValueError(f"augmented=[...] needs stage=tokenizer, got {self.stage!r}")
        if self.members and self.stage != ENSEMBLE:
            raise ValueError(f"members=[...] belong to stage={ENSEMBLE}, got stage={self.stage}")
        if self.stage == ENSEMBLE and (len(self.members) < 2 or self.dry_run):
            given = "dry_run=true" if self.dry_run else f"{self.members}"
            raise ValueError(f"stage={ENSEMBLE} needs members=[...], two or more, and trains nothing, got {given}")
        if not self.data + self.augmented and not self.dry_run and self.stage != ENSEMBLE:
            raise ValueError("data must name at least one data set, for instance data=[runs/demos]")
        if self.stage == "dynamics" and self.imagined and not self.init:
            raise ValueError("stage=dynamics imagined=[...] needs init=<checkpoint>, whose dynamics imagines them")
        if self.stage in ("heads", ENSEMBLE) and not self.held_out:
            raise ValueError(f"stage={self.stage} needs held_out=[...], data sets on which thresholds are set")

    @property
    def kind(self) -> str:
        """Of the dynamics."""
        return self.dynamics.get("kind", KINDS[0])


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


def _origin(command: TrainCommand) -> Path | None:
    """The checkpoint whose weights the stage's part starts from; None for random ones."""
    if not command.init:
        return None
    source = find_checkpoint(command.init)
    only_tokenizer = command.stage != "tokenizer" and command.stage not in read_config(source)
    return None if only_tokenizer else source


def with_settings_of_init(command: TrainCommand) -> TrainCommand:
    """Give the stage's part the settings that it has in `init`, but for those given, if that is of the same kind."""
    given, source = getattr(command, command.stage), _origin(command)
    if source is None or "preset" in given:
        return command
    kept = read_part(source, command.stage)
    if command.stage == "dynamics":
        kept = {"kind": read_config(source)["kind"]} | kept
    if kept.get("kind") != given.get("kind", kept.get("kind")):
        return command
    nested = {name: kept[name] | value for name, value in given.items() if isinstance(value, dict) and name in kept}
    return replace(command, **{command.stage: kept | given | nested})


def prepare(command: TrainCommand, checkpoint: Path) -> Stage:
    """Build what a command trains, from random weights or those of `init`, and its batches."""
    caches = open_caches(command.data)
    if command.stage != "tokenizer":
        for cache in [*caches, *open_caches(command.imagined), *open_caches(command.held_out)]:
            if not command.action_free:
                cache.require_actions()
        if command.init and not (checkpoint / "config.json").exists():
            copy_part(find_checkpoint(command.init), checkpoint, "tokenizer")
    stages = {
        "tokenizer": _tokenizer_stage,
        "dynamics": _dynamics_stage,
        "heads": _heads_stage,
        "decoder": _decoder_stage,
    }
    made = stages[command.stage](command, checkpoint, caches)
    if (source := _origin(command)) is not None:
        new = NEW_PARTS if isinstance(made.part, Transformer | Diffusion) else ("place_head",)
        load_weights(made.part, source, command.stage, new=new)
    for name, parameter in made.part.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(command.freeze)))
    return made


def part_of(command: TrainCommand, tokenizer: PatchTokenizer | None) -> tuple[type[torch.nn.Module], Any]:
    """Class and configuration of the dynamics, the heads or the decoder that read this tokenizer's latents."""
    if command.stage == "dynamics" and command.kind == "transformer":
        layout = None if tokenizer is None else tokenizer.layout
        return Transformer, transformer_from_preset(command.dynamics, layout, command.clip_length)
    if command.stage == "dynamics" and command.kind == "diffusion":
        shape = None if tokenizer is None else tokenizer.latent_shape
        return Diffusion, diffusion_config(command.dynamics, shape, command.clip_length)
    if command.stage == "dynamics" and command.kind == "irasim":
        values = {"num_frames": command.clip_length} | command.dynamics
        if tokenizer is not None:
            values |= {"grid": tokenizer.latent_shape[:2], "latent_dim": tokenizer.latent_shape[2]}
        return Irasim, build_config(IrasimConfig, values, Path("dynamics"))
    assert tokenizer is not None
    if command.stage == "dynamics":
        shared = {"levels": tokenizer.config.levels, "grid": tokenizer.grid}
        return Autoregressive, build_config(AutoregressiveConfig, command.dynamics | shared, Path("dynamics"))
    if command.stage == "decoder":
        grid, code_dim = tokenizer.latent_shape[:2], tokenizer.latent_shape[2]
        latents_of = wherever(command.decoder.get("latents_of", DiffusionDecoderConfig.latents_of))
        values = command.decoder | {"grid": grid, "code_dim": code_dim, "latents_of": latents_of}
        return LatentDenoiser, build_config(DiffusionDecoderConfig, values, Path("decoder"))
    values = {"instructions": tuple(task.instruction for task in TASKS.values())} | command.heads
    return Heads, build_config(HeadsConfig, values | {"latent_shape": tokenizer.latent_shape}, Path("heads"))


def tokenizer_of(command: TrainCommand, checkpoint: Path) -> PatchTokenizer:
    """The checkpoint's tokenizer, of the kind that the stage needs."""
    discrete = {"dynamics": command.kind not in OF_LATENTS, "decoder": True}.get(command.stage)
    return load_patch_tokenizer(checkpoint, discrete=discrete)


def _tokenizer_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer, values = build_tokenizer(command.tokenizer, Path("tokenizer"))
    mixture = Mixture(caches, open_caches(command.augmented), command.augmented_fraction)
    if isinstance(tokenizer, VideoTokenizer):
        return _video_tokenizer_stage(command, mixture, tokenizer, values)
    if command.objective:
        raise ValueError(f"objective needs tokenizer.kind=video, got {values['kind']!r}")
    check_size(mixture.caches[0], tokenizer.config.image_size)
    tokenizer.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]  # torch's stubs lack this form
    batches = TokenizerBatches(mixture, command.batch_size, command.seed)
    return Stage(tokenizer, tokenizer, batches, {"tokenizer": values})


def _video_tokenizer_stage(
    command: TrainCommand, mixture: Mixture, tokenizer: VideoTokenizer, values: dict[str, Any]
) -> Stage:
    config = build_config(ReconstructionConfig, command.objective, Path("objective"))
    image_every = 2 if command.image_every is None else command.image_every
    sizes = {"clip_length": command.clip_length, "batch_size": command.batch_size, "seed": command.seed}
    images = {"image_every": image_every, "image_stride": tokenizer.config.time_factor}
    batches = VideoBatches(mixture, **sizes, **images, crop=command.crop)
    tokenizer.config.check_clip(command.clip_length, *batches.crop)
    made_of = {"objective": as_json(config), "image_every": image_every, "crop": command.crop}
    return Stage(tokenizer, ReconstructionObjective(tokenizer, config), batches, {"tokenizer": values}, made_of)


def _dynamics_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer = tokenizer_of(command, checkpoint)
    cls, config = part_of(command, tokenizer)
    num_filmed, caches = len(caches), caches + open_caches(command.imagined)
    real = [encode_cache(tokenizer, cache) for cache in caches]
    imagined: list[np.ndarray | None] = [None] * num_filmed
    for k in range(num_filmed, len(caches)):
        imagined.append(keep_imagined(find_checkpoint(command.init), caches[k], real[k], contacts(caches[k])))
    if command.kind in OF_LATENTS and not config.latent_mean:
        mean, std = latent_statistics(real[:num_filmed])
        config = replace(config, latent_mean=mean, latent_std=std)
    clips = dynamics_batches(
        config,
        caches,
        real,
        imagined,
        grid=tokenizer.grid,
        image_every=command.image_every or 0,
        clip_length=command.clip_length,
        batch_size=command.batch_size,
        seed=command.seed,
        action_free=command.action_free,
    )
    model = cls(config)
    made = {"kind": command.kind, "dynamics": as_json(config)} | ({"action_free": True} if command.action_free else {})
    return Stage(model, model, clips, made, {"image_every": command.image_every or 0})


def _decoder_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer = tokenizer_of(command, checkpoint)
    _, config = part_of(command, tokenizer)
    aims_at = load_patch_tokenizer(config.latents_of, discrete=False)
    if aims_at.latent_shape[:2] != config.grid:
        raise ValueError(f"{config.latents_of} must have a grid of {config.grid}, got {aims_at.latent_shape[:2]}")
    tokens, latents = ([encode_cache(each, cache) for cache in caches] for each in (tokenizer, aims_at))
    if not config.latent_mean:
        mean, std = latent_statistics(latents)
        config = replace(config, latent_dim=aims_at.latent_dim, latent_mean=mean, latent_std=std)
    model = LatentDenoiser(config)
    batches = DecoderBatches(caches, tokens, latents, tokenizer.codec, command.batch_size, command.seed)
    return Stage(model, model, batches, {"decoder": as_json(config)})


def _heads_stage(command: TrainCommand, checkpoint: Path, caches: list[ClipCache]) -> Stage:
    tokenizer = tokenizer_of(command, checkpoint)
    _, config = part_of(command, tokenizer)
    model = Heads(config)
    again = open_caches(command.imagined)
    kept = [encode_cache(tokenizer, cache) for cache in caches]
    kept += [keep_imagined(checkpoint, cache, encode_cache(tokenizer, cache), contacts(cache)) for cache in again]
    batches = HeadsBatches(model, tokenizer.codec, caches + again, kept, command.batch_size, command.seed)
    return Stage(model, model, batches, {"heads": as_json(config)})
