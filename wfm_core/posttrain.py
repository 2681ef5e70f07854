"""Give a pretrained network's weights to one of other actions, frame size or inputs, and account for every tensor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wfm_core.models.autoregressive import AutoregressiveConfig
from wfm_core.models.diffusion_config import DiffusionConfig

type Config = AutoregressiveConfig | DiffusionConfig

ACTION_PART = "embed_action"
TEXT_PARTS = ["embed_text", "modulate_context", "context_attention"]
POSITION = "position"


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a network come from where.

    Attributes:
        loaded: as they are in the checkpoint.
        copied: to each of several cameras, from what one camera has.
        resized: of another grid, interpolated.
        new: begun anew; those that were zero change nothing at first.
        left: of the checkpoint, which the network has no use for.
    """

    loaded: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line a kind; names of what is not simply taken over."""
        lines = []
        for kind, names in asdict(self).items():
            if kind in ("loaded", "copied"):
                lines += [f"{kind}: {len(names)} tensors"] if names else []
            elif names:
                lines.append(f"{kind}: {', '.join(names)}")
        return "\n".join(lines)


def belongs_to(name: str, parts: Sequence[str]) -> bool:
    """Whether a parameter is one of some parts or in one: names or ends of names between dots, wherever they stand."""
    return any(f".{part}." in f".{name}." for part in parts)


def load_adapted(model: nn.Module, weights: Mapping[str, Tensor], new: Sequence[str]) -> LoadReport:
    """Fill a network with a checkpoint's weights, but for some parts.

    Args:
        model: to fill, in place.
        weights: of the checkpoint.
        new: submodules or parameters that begin anew, whatever the checkpoint has in their place.

    Returns:
        What became of every tensor of either.

    Raises:
        ValueError: any other tensor is missing, of another shape, or has no place; names all of them.
    """
    own = dict(model.state_dict())
    sources = {name: re.sub(r"\.each\.\d+\b", "", name) for name in own}
    copied = [name for name, source in sources.items() if name not in weights and source in weights]
    kept = {name: value for name, value in weights.items() if name not in {sources[each] for each in copied}}
    weights = kept | {name: weights[sources[name]] for name in copied}
    fresh = [name for name in own if belongs_to(name, new)]
    left = [name for name in weights if belongs_to(name, new)]
    missing = sorted(own.keys() - weights.keys() - set(fresh))
    extra = sorted(weights.keys() - own.keys() - set(left))
    resized = [n for n in own.keys() & weights.keys() - set(fresh) if own[n].shape != weights[n].shape]
    unlike = sorted(name for name in resized if name.split(".")[-1] != POSITION)
    if missing or extra or unlike:
        shapes = [f"{name} {tuple(weights[name].shape)}, here {tuple(own[name].shape)}" for name in unlike]
        raise ValueError(
            f"the checkpoint must fit the network but for {list(new)}; it lacks {missing}, has no place for {extra}, "
            f"and has other shapes of {shapes}"
        )
    for name, value in weights.items():
        if name not in left:
            own[name] = _resized(value, own[name].shape) if name in resized else value
    model.load_state_dict(own)
    copied = [name for name in copied if name not in fresh]
    loaded = [name for name in own if name in weights and not {name} & {*fresh, *resized, *copied}]
    return LoadReport(tuple(loaded), tuple(copied), tuple(sorted(resized)), tuple(fresh), tuple(left))


def begin_at_zero(model: nn.Module, new: Sequence[str]) -> None:
    """Set the last layer of each new part to zero, in place: the network computes as before until it is trained."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in new:
            layer = module[-1] if isinstance(module, nn.Sequential) else module
            for parameter in layer.parameters(recurse=False):
                nn.init.zeros_(parameter)


def freeze(model: nn.Module, parts: Sequence[str], new: Sequence[str]) -> None:
    """Keep parts of a network as they are, in place.

    Raises:
        ValueError: there is no such part, or it begins anew and would stay zero.
    """
    parameters = dict(model.named_parameters())
    for part in parts:
        mine = [name for name in parameters if belongs_to(name, [part])]
        if not mine:
            known = sorted({name.split(".")[0] for name in parameters})
            raise ValueError(f"freeze must name parts of the network, {', '.join(known)} or inner ones, got {part!r}")
        if anew := [name for name in mine if belongs_to(name, new)]:
            raise ValueError(f"freeze must not name what begins anew, which would stay as it is drawn, got {anew}")
        for name in mine:
            parameters[name].requires_grad_(False)


def new_parts(before: Config, after: Config) -> list[str]:
    """Name the parts of a network that begin anew when its configuration changes so."""
    parts = [ACTION_PART] if before.actions != after.actions else []
    if (before.text_dim, before.text_encoder) != (after.text_dim, after.text_encoder):
        parts += TEXT_PARTS
    if isinstance(before, AutoregressiveConfig) and isinstance(after, AutoregressiveConfig):
        parts += ["embed_rays"] if before.rays != after.rays else []
        parts += ["embed_camera"] if before.num_cameras != after.num_cameras else []
    return parts


def _resized(position: Tensor, shape: Sequence[int]) -> Tensor:
    """Interpolate embeddings of square grids, (n, D) or (1, D, h, w)."""
    if position.ndim == 4:
        return F.interpolate(position.float(), size=shape[-2:], mode="bicubic", align_corners=False).to(position.dtype)
    side, wanted = round(len(position) ** 0.5), round(shape[0] ** 0.5)
    picture = rearrange(position.float(), "(h w) d -> 1 d h w", h=side)
    larger = F.interpolate(picture, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return rearrange(larger, "1 d h w -> (h w) d").to(position.dtype)
