"""Checkpoints: a folder of `config.json` and safetensors files, written atomically, loaded strictly.

`config.json` holds `kind` and the configuration dataclass of each part under the part's name,
`<part>.safetensors` its weights (stored as float16). Shipped checkpoints are folders of `wfm_core/checkpoints`,
loaded by name.
"""

import dataclasses
import difflib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from wfm_core.data.files import write_atomic
from wfm_core.ensemble import Ensemble
from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.decoding import TransformerModel
from wfm_core.models.denoising import DiffusionModel
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.models.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig, LatentDenoiser
from wfm_core.models.irasim import Irasim, IrasimConfig
from wfm_core.models.latent_world_model import LatentWorldModel
from wfm_core.models.revealing import AutoregressiveModel
from wfm_core.models.text import load_text_encoder
from wfm_core.models.token_world_model import TokenDynamics, TokenWorldModel
from wfm_core.models.transformer_config import TransformerConfig
from wfm_core.packing import pack_linears
from wfm_core.precision import compute_dtype
from wfm_core.tokenizers.patch import PatchTokenizer, PatchTokenizerConfig
from wfm_core.tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from wfm_core.world_model import WorldModel

SHIPPED_DIR = Path(__file__).parent / "checkpoints"

Tokenizer = PatchTokenizer | VideoTokenizer
TOKENIZERS: dict[str, tuple[Callable[[Any], Tokenizer], type]] = {
    "patch": (PatchTokenizer, PatchTokenizerConfig),
    "video": (VideoTokenizer, VideoTokenizerConfig),
}
"""Kind of tokenizer -> its class and its configuration."""
ENSEMBLE = "ensemble"  # kind of a checkpoint that names others, its "members", and has a calibration of its own
WORLD_PARTS = ("tokenizer", "dynamics")  # of a world model
DECODERS = ("tokenizer", "diffusion")  # what draws a world model's pixels
DEFAULT_TOKENIZER = "patch"  # the kind of those whose configuration names none


def find_checkpoint(name_or_path: str | Path) -> Path:
    """Return the folder of a shipped checkpoint's name or of a path.

    Raises:
        ValueError: neither; names the nearest shipped checkpoint.
    """
    for folder in (Path(name_or_path), SHIPPED_DIR / str(name_or_path)):
        if (folder / "config.json").is_file():
            return folder
    shipped = sorted(path.parent.name for path in SHIPPED_DIR.glob("*/config.json"))
    nearest = difflib.get_close_matches(str(name_or_path), shipped, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"no checkpoint {str(name_or_path)!r}: expected a folder with config.json or one of the shipped {shipped}{hint}"
    )


def wherever(name_or_path: str) -> str:
    """What names the same checkpoint from any working directory: a shipped name, or an absolute path."""
    return str(Path(name_or_path).resolve()) if (Path(name_or_path) / "config.json").is_file() else name_or_path


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder.

    Raises:
        ValueError: it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {folder} lacks config.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def read_part(folder: Path, part: str) -> dict[str, Any]:
    """Read the configuration of one part, "tokenizer" or "dynamics" for instance, from `config.json`.

    Raises:
        ValueError: the file is missing or damaged, or the checkpoint has no such part (yet).
    """
    config = read_config(folder)
    if not isinstance(config.get(part), dict):
        raise ValueError(f"{folder}/config.json must describe the part {part!r}, got only {sorted(config)}")
    return config[part]


def parts_folder(folder: Path) -> Path:
    """Where a checkpoint's tokenizer and heads are: in its folder or, of an ensemble, in that of its first member."""
    config = read_config(folder)
    return find_checkpoint(config["members"][0]) if config.get("kind") == ENSEMBLE else folder


def world_digest(name_or_path: str) -> str:
    """16 hex digits that change with any byte of the settings, tokenizer or dynamics of a world model.

    Raises:
        ValueError: no such checkpoint, or one that has no dynamics of its own.
    """
    folder = find_checkpoint(name_or_path)
    digest = hashlib.sha256(json.dumps([read_part(folder, part) for part in WORLD_PARTS], sort_keys=True).encode())
    for part in WORLD_PARTS:
        digest.update((folder / f"{part}.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` atomically."""
    write_atomic(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def copy_part(source: Path, folder: Path, part: str) -> None:
    """Begin the checkpoint `folder` with one part of another.

    Raises:
        ValueError: the source has no such part.
    """
    values = read_part(source, part)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / f"{part}.safetensors", folder / f"{part}.safetensors")
    write_config(folder, {part: values})


def build_config[ConfigT](cls: type[ConfigT], values: Mapping[str, Any], where: Path) -> ConfigT:
    """Build a configuration dataclass from JSON values (lists become tuples; "kind", which chose `cls`, is left out).

    A field that is a dataclass itself is built from its own JSON object.

    Raises:
        ValueError: a key is unknown or missing, or a value of the wrong type; names the file.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "kind"}
    kinds = get_type_hints(cls)
    for name, value in values.items():
        kind = get_origin(kinds.get(name)) or kinds.get(name)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            values[name] = build_config(kind, value, where)
            continue
        plain = {int: int, float: (int, float), bool: bool, str: str, tuple: tuple, list: tuple}
        wanted = kind if dataclasses.is_dataclass(kind) else plain.get(kind, object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind in (int, float)):
            raise ValueError(f"{where}/config.json: {name} must be of type {kinds[name]}, got {value!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}/config.json does not fit {cls.__name__}: {error}") from error


def save_weights(folder: Path, part: str, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> None:
    """Write `<part>.safetensors` atomically, floats as `dtype`."""
    cast = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous() for k, v in weights.items()}
    write_atomic(folder / f"{part}.safetensors", save(cast))


def load_weights[ModuleT: nn.Module](module: ModuleT, folder: Path, part: str, *, new: tuple[str, ...] = ()) -> ModuleT:
    """Load `<part>.safetensors` into a module, strictly; returns the module in evaluation mode.

    Args:
        module: to fill.
        folder: of the checkpoint.
        part: name of the file.
        new: submodules that the file may lack; these stay as they are.

    Raises:
        ValueError: the file is missing, damaged or holds other tensors than the module has; names it.
    """
    path = folder / f"{part}.safetensors"
    try:
        weights = load_file(path)
        own = module.state_dict()
        fresh = {name: own[name] for name in own.keys() - weights.keys() if set(new) & set(name.split("."))}
        module.load_state_dict(weights | fresh)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {folder} lacks {path.name}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from error
    return module.eval()


def as_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def build_tokenizer(values: Mapping[str, Any], where: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Build a tokenizer with random weights.

    Args:
        values: "kind", a key of `TOKENIZERS` ("patch" if left out), and the settings that differ from its defaults.
        where: whose values they are, for the errors.

    Returns:
        The tokenizer and all its settings, as `config.json` keeps them.

    Raises:
        ValueError: unknown kind, or settings that do not fit it.
    """
    kind = values.get("kind", DEFAULT_TOKENIZER)
    if kind not in TOKENIZERS:
        raise ValueError(f"{where}/config.json: a tokenizer's kind must be one of {sorted(TOKENIZERS)}, got {kind!r}")
    cls, config_cls = TOKENIZERS[kind]
    config = build_config(config_cls, values, where)
    return cls(config), {"kind": kind, **as_json(config)}


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint, of whatever kind, float32.

    Raises:
        ValueError: unknown name or kind, damaged or unfitting file.
    """
    folder = parts_folder(find_checkpoint(name_or_path))
    tokenizer, _ = build_tokenizer(read_part(folder, "tokenizer"), folder)
    return load_weights(tokenizer, folder, "tokenizer")


def load_patch_tokenizer(name_or_path: str | Path, *, discrete: bool | None = None) -> PatchTokenizer:
    """Load a checkpoint's tokenizer as `load_tokenizer` does, for those who need latents of each patch and frame.

    Args:
        name_or_path: of the checkpoint.
        discrete: whether these must be tokens, or must not; None: they may be either.

    Raises:
        ValueError: as `load_tokenizer`; or the tokenizer is of another kind, or not what is needed.
    """
    tokenizer = load_tokenizer(name_or_path)
    found = tokenizer.config.name
    if not isinstance(tokenizer, PatchTokenizer):
        raise ValueError(f"{name_or_path}: needs a tokenizer of kind 'patch', got {found}")
    if discrete not in (None, bool(tokenizer.config.levels)):
        raise ValueError(f"{name_or_path}: needs a {'discrete' if discrete else 'continuous'} tokenizer, got {found}")
    return tokenizer


def load_dynamics(folder: Path) -> TokenDynamics | DiffusionModel | Irasim:
    """Load the dynamics of a checkpoint folder, float32: the one place that turns `kind` into a class.

    Raises:
        ValueError: unknown kind, damaged or unfitting file.
    """
    config = read_config(folder)
    match config.get("kind"):
        case "autoregressive":
            model = AutoregressiveModel(build_config(AutoregressiveConfig, read_part(folder, "dynamics"), folder))
        case "transformer":
            model = TransformerModel(build_config(TransformerConfig, read_part(folder, "dynamics"), folder))
        case "diffusion":
            model = DiffusionModel(build_config(DiffusionConfig, read_part(folder, "dynamics"), folder))
        case "irasim":
            model = Irasim(build_config(IrasimConfig, read_part(folder, "dynamics"), folder))
        case other:
            known = "'autoregressive', 'transformer', 'diffusion' or 'irasim'"
            raise ValueError(f"{folder}/config.json: kind must be {known}, got {other!r}")
    return load_weights(model, folder, "dynamics")


def load_diffusion_decoder(folder: Path) -> DiffusionDecoder:
    """Load the diffusion decoder of a checkpoint folder, and the tokenizer whose latents it draws, float32.

    Raises:
        ValueError: the checkpoint has none, or a damaged or unfitting file.
    """
    config = build_config(DiffusionDecoderConfig, read_part(folder, "decoder"), folder)
    denoiser = load_weights(LatentDenoiser(config), folder, "decoder")
    return DiffusionDecoder(denoiser, load_patch_tokenizer(config.latents_of, discrete=False)).eval()


def load_world_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = True,
    decoder: str = DECODERS[0],
) -> WorldModel:
    """Build the world model of a checkpoint.

    Args:
        name_or_path: a shipped name or a folder.
        device: where to run.
        dtype: of weights and activations; None chooses bfloat16 where it is fast, else float32.
        packed: lay weights out for the CPU's matrix kernels; not for who compiles the model, which does so itself.
        decoder: what draws pixels, "tokenizer" or, if the checkpoint has one, the "diffusion" decoder.

    Raises:
        ValueError: unknown name, kind or decoder, damaged or unfitting file.
    """
    folder, device = find_checkpoint(name_or_path), torch.device(device)
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {DECODERS}, got {decoder!r}")
    if (config := read_config(folder)).get("kind") == ENSEMBLE:
        members, digests = config["members"], config["digests"]
        if changed := [name for name, digest in zip(members, digests, strict=True) if digest != world_digest(name)]:
            raise ValueError(f"{folder}: {changed} must be as when the ensemble was put together; do so again")
        load = partial(load_world_model, device=device, dtype=dtype, packed=packed)
        loaded = {members[0]: load(members[0], decoder=decoder)}  # whose frames are seen
        loaded |= {name: load(name) for name in dict.fromkeys(members) if name not in loaded}
        return Ensemble([loaded[name] for name in members])
    dynamics = load_dynamics(folder)
    reads = read_part(folder, "dynamics").get("text_encoder")
    encoder = load_text_encoder(reads) if reads else None
    if isinstance(dynamics, DiffusionModel | Irasim):
        model = LatentWorldModel(load_patch_tokenizer(folder, discrete=False), dynamics, encoder)
    else:
        model = TokenWorldModel(load_patch_tokenizer(folder, discrete=True), dynamics, encoder)
    if decoder == "diffusion":
        model.decoder = load_diffusion_decoder(folder)
    model.eval().requires_grad_(False).to(device)
    model.compute_in(dtype or compute_dtype(device))
    if packed:
        pack_linears(model)
    return model
