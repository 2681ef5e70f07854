"""Configurations of dynamics, fitted to a tokenizer and to the clips of their training."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wfm_core.checkpoint import as_json, build_config
from wfm_core.models.diffusion_config import DiffusionConfig
from wfm_core.models.text import load_text_encoder
from wfm_core.models.transformer_config import PRESETS, TransformerConfig
from wfm_core.world_model import Layout


def transformer_from_preset(settings: Mapping[str, Any], layout: Layout | None, clip_length: int) -> TransformerConfig:
    """Build a configuration of a Llama-style decoder by the name of its size.

    Args:
        settings: "preset", a key of `PRESETS` ("nano" if left out), and what differs from it; "kind" is left out.
        layout: of the tokenizer's tokens, to be taken over; None keeps the preset's.
        clip_length: frames of a training clip; the rotary positions cover as many unless told otherwise.

    Raises:
        ValueError: unknown preset or setting, or settings that do not fit each other.
    """
    _check(clip_length)
    given = {name: value for name, value in settings.items() if name not in ("kind", "preset")}
    preset = settings.get("preset", "nano")
    if preset not in PRESETS:
        raise ValueError(f"dynamics.preset must be one of {list(PRESETS)}, got {preset!r}")
    values = as_json(PRESETS[preset]) | given
    if layout is not None:
        (cameras, *grid), levels = layout.cells, list(layout.levels)
        token = levels[: len(levels) // values["groups"]]
        if token * values["groups"] != levels:
            raise ValueError(
                f"dynamics.groups must split the tokenizer's levels {levels} into equal tokens, got {values['groups']}"
            )
        values |= {"num_cameras": cameras, "grid": tuple(grid), "levels": token}
    rope = as_json(PRESETS[preset].rope) | given.get("rope", {})
    if "trained_frames" not in given.get("rope", {}):
        rope["trained_frames"] = math.ceil(clip_length / rope["extension"])
    if values["text_encoder"]:
        values["text_dim"] = load_text_encoder(values["text_encoder"]).feature_dim
    return build_config(TransformerConfig, values | {"rope": rope}, Path("dynamics"))


def diffusion_config(
    settings: Mapping[str, Any], latent_shape: tuple[int, int, int] | None, clip_length: int
) -> DiffusionConfig:
    """Build a configuration of a diffusion model.

    Args:
        settings: what differs from the defaults; "kind" is left out.
        latent_shape: (h, w, C) of the tokenizer's latents, to be taken over; None keeps the defaults.
        clip_length: frames of a training clip; the rotary positions cover as many unless told otherwise.

    Raises:
        ValueError: unknown setting, or settings that do not fit each other.
    """
    _check(clip_length)
    rope = dict(settings.get("rope", {}))
    rope.setdefault("trained_frames", math.ceil(clip_length / rope.get("extension", 1)))
    values: dict[str, Any] = {**settings, "rope": rope}
    if latent_shape is not None:
        values |= {"grid": latent_shape[:2], "latent_dim": latent_shape[2]}
    if values.get("text_encoder"):
        values["text_dim"] = load_text_encoder(values["text_encoder"]).feature_dim
    return build_config(DiffusionConfig, values, Path("dynamics"))


def _check(clip_length: int) -> None:
    if clip_length < 2:
        raise ValueError(f"clip_length must be at least 2, a frame and the next, got {clip_length}")
