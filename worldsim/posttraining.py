"""From a pretrained world model to one of another robot, camera or task: what `worldsim-posttrain` is made of."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from wfm_core import DEFAULT_WORLD_MODEL
from wfm_core.checkpoint import (
    as_json,
    build_config,
    find_checkpoint,
    load_patch_tokenizer,
    read_config,
    read_part,
    save_weights,
    write_config,
)
from wfm_core.data.actions import ActionSpace, action_space_of
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.episode import OWN_ACTIONS
from wfm_core.encoding import encode_cache
from wfm_core.lora import add_lora
from wfm_core.models.autoregressive import Autoregressive, AutoregressiveConfig
from wfm_core.models.diffusion import Diffusion
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.models.motion import Contact
from wfm_core.models.text import load_text_encoder
from wfm_core.posttrain import Config, LoadReport, begin_at_zero, freeze, load_adapted, new_parts
from wfm_core.tokenizers.batches import Mixture, TokenizerBatches
from wfm_core.tokenizers.patch import PatchTokenizer
from wfm_core.train import BatchFn, OnLog, TrainConfig, fit
from worldsim.caches import open_caches
from worldsim.dynamics_data import contacts, dynamics_batches

FAMILIES: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "autoregressive": (Autoregressive, AutoregressiveConfig),
    "diffusion": (Diffusion, DiffusionConfig),
}
"""Kind of dynamics that can be post-trained -> its network and configuration."""
CONTACT_PART = "contact_head"  # of the autoregressive family
METHODS = ("full", "lora")
ACTIONS = ("", "keep", "new", "none")
BRIDGE_STEPS = len(ActionSpace().travel_scale)
TRAIN = {"num_steps": 2000, "learning_rate": 3e-4, "checkpoint_every": 250}
"""Settings of the loop that differ from those of a training from the start."""
DECODER_BATCH = 16  # frames
DECODER_TRAIN = TrainConfig(warmup_steps=20, checkpoint_every=100)


@dataclass
class PosttrainCommand:
    """What to post-train, and on what.

    Attributes:
        init: the pretrained checkpoint, by shipped name or folder; of kind autoregressive or diffusion.
        data: folders of data sets, any format that `wfm_core.data.open_dataset` reads; frames are resized.
        videos: folders of videos, or of data sets whose actions are hidden, that are shown about as often as the data:
            they teach what the world looks like where few episodes have actions.
        held_out: folders of data sets on which the model is judged, before and after.
        options: of the formats' readers: {camera: ..., action_key: ..., convention: own} for instance.
        held_out_options: those that differ there: {split: val} for instance, of the same folder.
        relabel: replace actions by what was reached; of recordings that mix conventions or command lags, such as all of
            BridgeData V2.
        num_judged: episodes of each held-out data set on which the model is judged, evenly spread; 0: all.
        caches: folder of decoded frames, which several runs may share; "": `out`/caches.
        out: run folder; the checkpoint is `out`/checkpoint, what was found `out`/posttrain.json.
        method: "full" trains all weights, "lora" adapters of the large matrices, which are merged in the end, and new
            parts.
        rank: of the adapters.
        freeze: parts of the network to keep as they are, [layers, position] for instance.
        actions: "keep" the pretrained action projection and its bounds; "new": a projection that is zero at first, and
            bounds read off the data; "none": learn from frames alone; "": "new" where `init` knows no actions or the
            data are another robot's (convention=own), else "keep".
        steps_dim: of new actions, how many leading dimensions are steps that add up to where the arm is, as in Bridge's
            6; 0 for targets. -1: 6 for Bridge's actions, 0 for another robot's.
        frame_size: side of the frames in pixels; 0: as pretrained. Positions are interpolated.
        text_encoder: reads the instruction from now on, "bytes" or the folder of a T5; "": as pretrained.
        cameras: feature names of LeRobot data sets; what several see is imagined together. Empty: the first one alone.
            For init of kind autoregressive, as is:
        rays: tell from where each frame is seen, which recordings of a moving camera say.
        batch_size: clips of a batch.
        clip_length: frames of a clip.
        seed: of new weights and batches.
        threads: torch threads; 0 leaves torch's choice.
        device: "cpu" or "cuda".
        decoder_steps: for which the tokenizer's decoder first learns how the data look; 0 leaves it as it is. The
            encoder always stays, so that latents go on meaning what they meant to the network and its heads.
        dynamics: further settings of the network that differ from the pretrained ones.
        train: settings of the loop that differ from `TRAIN` and its defaults.
    """

    init: str = DEFAULT_WORLD_MODEL
    data: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    held_out_options: dict[str, Any] = field(default_factory=dict)
    relabel: bool = False
    num_judged: int = 100
    caches: str = ""
    out: str = "runs/posttrained"
    method: str = METHODS[0]
    rank: int = 16
    freeze: list[str] = field(default_factory=list)
    actions: str = ""
    steps_dim: int = -1
    frame_size: int = 0
    text_encoder: str = ""
    cameras: list[str] = field(default_factory=list)
    rays: bool = False
    batch_size: int = 16
    clip_length: int = 11
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    decoder_steps: int = 400
    dynamics: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("actions", ACTIONS), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("data", "held_out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one data set, for instance {name}=[path/to/bridge]")
        overlap = {Path(a).resolve() for a in self.data} & {Path(b).resolve() for b in self.held_out}
        if overlap and self.options == self.options | self.held_out_options:
            raise ValueError(f"held_out must not be trained on, got {sorted(map(str, overlap))} in both")

    @property
    def num_cameras(self) -> int:
        """How many cameras are imagined together."""
        return max(1, len(self.cameras))


@dataclass(frozen=True)
class Prepared:
    """What is trained, and on what.

    Attributes:
        model: the network, adapted and with adapters if there are any.
        kind: of the dynamics.
        config: its settings.
        tokenizer: of the checkpoint that is made.
        report: which weights are whose.
        caches: of the data.
        held_out: of what the model is judged on.
        batches: what it is trained on.
        frames: what the tokenizer's decoder is trained on.
        comparable: whether the pretrained model, too, can imagine these episodes.
        action_free: whether it learns from frames alone.
    """

    model: nn.Module
    kind: str
    config: Config
    tokenizer: PatchTokenizer
    report: LoadReport
    caches: list[ClipCache]
    held_out: list[ClipCache]
    batches: BatchFn
    frames: BatchFn
    comparable: bool
    action_free: bool


def prepare(command: PosttrainCommand) -> Prepared:
    """Adapt the pretrained network and open the data.

    Raises:
        ValueError: the checkpoint, the data and the settings do not go together; says how.
    """
    source = find_checkpoint(command.init)
    kind = read_config(source).get("kind", "")
    if kind not in FAMILIES:
        raise ValueError(f"init must be a world model of kind {' or '.join(FAMILIES)}, got {kind!r} in {source}")
    network, config_type = FAMILIES[kind]
    before: Config = build_config(config_type, read_part(source, "dynamics"), source)
    tokenizer = _tokenizer(source, command.frame_size)
    beside = Path(command.caches or Path(command.out) / "caches")
    opened: dict[str, Any] = {"frame_shape": tokenizer.frame_shape, "beside": beside, "cameras": command.cameras}
    others = command.options | command.held_out_options
    caches = open_caches(command.data, options=command.options, relabel=command.relabel, **opened)
    held_out = open_caches(command.held_out, options=others, relabel=command.relabel, **opened)
    held_out = [_some(cache, command.num_judged) for cache in held_out]
    videos = open_caches(command.videos, options=command.options, **opened)
    shown = caches + _as_videos(caches, videos) if videos else caches
    action_free = command.actions == "none"
    if not action_free:
        _require_alike([*caches, *held_out])
    config = _adapted(command, source, before, tokenizer, caches)
    if not action_free and (dim := caches[0].columns["actions"].shape[1]) != config.actions.dim:
        raise ValueError(f"the model reads actions of {config.actions.dim} dimensions, got {dim}; choose actions=new")
    model = network(config)
    new = new_parts(before, config)
    knows_contact = not action_free and any((contacts(cache) != Contact.UNKNOWN).any() for cache in caches)
    if isinstance(model, Autoregressive) and not knows_contact:
        new.append(CONTACT_PART)
    report = load_adapted(model, load_file(source / "dynamics.safetensors"), new)
    begin_at_zero(model, new)
    if isinstance(model, Autoregressive) and not knows_contact:
        model.forget_contact()
    if command.method == "lora":
        add_lora(model, command.rank, new)
    freeze(model, command.freeze, new)
    batches = dynamics_batches(
        config,
        shown,
        [encode_cache(tokenizer, cache) for cache in shown],
        [None] * len(shown),
        grid=tokenizer.grid,
        image_every=0,
        clip_length=command.clip_length,
        batch_size=command.batch_size,
        seed=command.seed,
        action_free=action_free,
    )
    comparable = config.actions == before.actions and not command.frame_size and command.num_cameras == 1
    # Of data as they come, neither the scene nor a still camera is known.
    frames = TokenizerBatches(Mixture(shown), DECODER_BATCH, command.seed, num_cameras=command.num_cameras, still=False)
    return Prepared(model, kind, config, tokenizer, report, caches, held_out, batches, frames, comparable, action_free)


def teach_decoder(command: PosttrainCommand, made: Prepared, on_log: OnLog | None = None) -> None:
    """Let the tokenizer's decoder learn how the data look, in place.

    What a decoder learned of still cameras, to fill in what stands behind the arm from the first frame, would make a
    camera on the wrist or a moving one stand still, whatever the latents say.
    """
    tokenizer, config = made.tokenizer, replace(DECODER_TRAIN, num_steps=command.decoder_steps)
    tokenizer.encoder.requires_grad_(False)
    tokenizer.to(command.device)
    decide = ("init", "data", "videos", "options", "cameras", "frame_size", "seed")
    made_of = {name: getattr(command, name) for name in decide}
    weights = fit(tokenizer, made.frames, config, Path(command.out) / "decoder", batches=made_of, on_log=on_log)
    tokenizer.load_state_dict(weights)
    tokenizer.to("cpu").eval()


def keep(command: PosttrainCommand, checkpoint: Path, made: Prepared, weights: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint, with the heads of `init`, if these read the same latents."""
    source = find_checkpoint(command.init)
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_weights(checkpoint, "tokenizer", made.tokenizer.state_dict())
    save_weights(checkpoint, "dynamics", weights)
    named = {name: value for name, value in read_part(source, "tokenizer").items() if name == "kind"}
    config: dict[str, Any] = {"tokenizer": named | as_json(made.tokenizer.config)}
    config |= {"kind": made.kind, "dynamics": as_json(made.config)}
    if made.action_free:
        config["action_free"] = True
    heads = read_config(source).get("heads")
    if heads and tuple(heads["latent_shape"]) == made.tokenizer.latent_shape and command.num_cameras == 1:
        shutil.copyfile(source / "heads.safetensors", checkpoint / "heads.safetensors")
        config["heads"] = heads
    write_config(checkpoint, config)


def _tokenizer(source: Path, frame_size: int) -> PatchTokenizer:
    """The tokenizer of `source`, for frames of another size if that is not 0."""
    tokenizer = load_patch_tokenizer(source)
    if frame_size and frame_size != tokenizer.config.image_size:
        larger = PatchTokenizer(replace(tokenizer.config, image_size=frame_size))
        load_adapted(larger, tokenizer.state_dict(), [])
        tokenizer = larger.eval()
    return tokenizer


def _some(cache: ClipCache, count: int) -> ClipCache:
    """`count` episodes of a cache that show more than one frame, evenly spread; 0: all of these."""
    whole = np.flatnonzero(cache.lengths > 1)
    if not len(whole):
        raise ValueError(f"held_out must have episodes of two or more frames, got none in {cache.directory}")
    picked = np.linspace(0, len(whole) - 1, min(count, len(whole)) if count else len(whole)).round().astype(int)
    return cache.subset(whole[picked])


def _adapted(
    command: PosttrainCommand, source: Path, before: Config, tokenizer: PatchTokenizer, caches: Sequence[ClipCache]
) -> Config:
    """The pretrained network's settings with all that the command changes of them."""
    changed: dict[str, Any] = dict(command.dynamics)
    if (command.actions or _usual_actions(source, caches)) == "new":
        changed["actions"] = as_json(_new_space(command.steps_dim, caches))
    if command.text_encoder:
        feature_dim = load_text_encoder(command.text_encoder).feature_dim
        changed |= {"text_encoder": command.text_encoder, "text_dim": feature_dim}
    if isinstance(before, AutoregressiveConfig):
        changed["grid"] = tokenizer.grid
    else:
        changed["grid"] = tokenizer.latent_shape[:2]
    if command.rays or command.num_cameras > 1:
        if not isinstance(before, AutoregressiveConfig):
            raise ValueError(f"rays and several cameras need init of kind autoregressive, got another in {source}")
        changed |= {"rays": command.rays, "num_cameras": command.num_cameras}
    return build_config(type(before), as_json(before) | changed, Path("dynamics"))


def _as_videos(caches: Sequence[ClipCache], videos: Sequence[ClipCache]) -> list[ClipCache]:
    """Hide the actions of `videos`, in place, and repeat `caches` until they are about as many frames."""
    for cache in videos:
        cache.columns["actions"] = np.full((len(cache.frames), *caches[0].columns["actions"].shape[1:]), np.nan, "f4")
    labelled, others = (sum(len(cache.frames) for cache in some) for some in (caches, videos))
    return [*videos, *list(caches) * (round(others / labelled) - 1)]


def _usual_actions(source: Path, caches: Sequence[ClipCache]) -> str:
    own = any(episode["convention"] == OWN_ACTIONS for cache in caches for episode in cache.episodes)
    return "new" if own or read_config(source).get("action_free", False) else "keep"


def _new_space(steps_dim: int, caches: Sequence[ClipCache]) -> ActionSpace:
    """Bounds of the actions of all episodes."""
    own = caches[0].episodes[0]["convention"] == OWN_ACTIONS
    dim = (0 if own else BRIDGE_STEPS) if steps_dim < 0 else steps_dim
    rows = [
        cache.columns["actions"][start : start + length - 1]
        for cache in caches
        for start, length in zip(cache.starts, cache.lengths, strict=True)
    ]
    return action_space_of(rows, dim)


def _require_alike(caches: Sequence[ClipCache]) -> None:
    """Actions of two meanings would teach neither."""
    for cache in caches:
        cache.require_actions()
    found = {(episode["convention"], episode["command_lag"]) for cache in caches for episode in cache.episodes}
    if len(found) > 1:
        raise ValueError(
            f"all data must have one action convention and command lag, got {sorted(found)}; "
            "relabel=true makes them alike"
        )
