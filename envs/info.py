"""Gymnasium's vector info: every key an array of B rows, with a bool mask `_key` of the rows that have it."""

from typing import Any

import numpy as np


def masked_info(info: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Blank the rows outside `mask` (B,) and add Gymnasium's `_key` masks."""
    out: dict[str, np.ndarray] = {}
    for key, value in info.items():
        blank = np.full_like(value, None) if value.dtype == object else np.zeros_like(value)
        out[key] = np.where(mask, value, blank)
        out[f"_{key}"] = mask.copy()
    return out


def joined_info(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join two masked infos of disjoint rows."""
    out = dict(first)
    for key in second:
        if key.startswith("_"):
            continue
        mask = second[f"_{key}"]
        out[key] = np.where(mask, second[key], first[key]) if key in first else second[key]
        out[f"_{key}"] = first[f"_{key}"] | mask if key in first else mask
    return out


def first_row(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return fresh copies of row 0 of every array."""
    return {key: value[0].copy() for key, value in batch.items()}


def first_row_info(info: dict[str, Any]) -> dict[str, Any]:
    """Turn the info of one row into plain Python values, without the masks."""
    return {
        key: value[0].item() if isinstance(value[0], np.generic) else value[0]
        for key, value in info.items()
        if not key.startswith("_") and info[f"_{key}"][0]
    }
