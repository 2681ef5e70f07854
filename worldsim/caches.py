"""Clip caches of data sets, by folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wfm_core.data import open_dataset
from wfm_core.data.clip_cache import ClipCache, build_clip_cache
from wfm_core.data.episode import Episode
from wfm_core.data.files import listing


def open_caches(
    folders: Sequence[str],
    *,
    frame_shape: tuple[int, int, int] | None = None,
    beside: Path | None = None,
    options: Mapping[str, Any] | None = None,
    cameras: Sequence[str] = (),
    relabel: bool = False,
) -> list[ClipCache]:
    """Open the clip cache of each data set, building it on first use; a cache also does without its data set.

    Args:
        folders: of the data sets.
        frame_shape: (H, W, 3) to which each camera's frames are resized; None leaves them as they are.
        beside: the folder in which caches are; None: each lies where its data set does.
        options: of the formats' readers.
        cameras: feature names in LeRobot data sets, "observation.images.wrist" for instance; of several the frames
            stand on top of each other, (V * H, W, 3). Empty: the first one's. Rows do not depend on it.
        relabel: replace actions by what was reached, so that recordings of all conventions and lags go together.

    Raises:
        ValueError: no data set, none of that camera, or one that has changed since its cache was built.
    """
    caches = []
    for folder in map(Path, folders):
        size = "" if frame_shape is None else f".{frame_shape[0]}x{frame_shape[1]}"
        read = "" if not options else f".{_short_hash(json.dumps(options, sort_keys=True))}"
        views = "".join(f".{camera.rpartition('.')[2]}" for camera in cameras)
        # Elsewhere two data sets may be called alike.
        where = "" if beside is None else f".{_short_hash(str(folder.resolve()))}"
        reached = ".relabelled" if relabel else ""
        directory = (beside or folder.parent) / f"{folder.name}{where}{size}{read}{views}{reached}.cache"
        fingerprint = listing(folder)
        if not directory.exists():
            episodes = open_dataset(folder, **(options or {}), **_seen_by(cameras))
            progress = tqdm(episodes, desc=f"decoding {folder}")
            shown = (_stacked(episode, frame_shape, relabel) for episode in progress)
            build_clip_cache(shown, directory, fingerprint=fingerprint)
        cache = ClipCache(directory)
        if fingerprint and cache.fingerprint not in ("", fingerprint):
            raise ValueError(f"{folder} must be as when {directory} was built, but has changed; delete {directory}")
        caches.append(cache)
    return caches


def _seen_by(cameras: Sequence[str]) -> dict[str, Any]:
    """Options of a reader for these cameras."""
    views = {f"view_{k}": camera for k, camera in enumerate(cameras)}
    return {"camera": views.pop("view_0"), "views": views} if cameras else {}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _stacked(episode: Episode, frame_shape: tuple[int, int, int] | None, relabel: bool) -> Episode:
    """An episode whose views stand below its frames."""
    episode = episode.resized(*frame_shape[:2]) if frame_shape else episode
    episode = episode.relabelled() if relabel else episode
    return replace(episode, frames=np.concatenate([episode.frames, *episode.views.values()], axis=1), views={})
