"""Examine one episode of a data set: read it, measure it, and describe it, whatever is wrong with it."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from wfm_core.curation.duplicates import fingerprint
from wfm_core.curation.measures import MEASURED, measure_frames, measure_robot
from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.lerobot import LeRobotReader
from wfm_core.data.readers import MultiView, open_dataset


@dataclass(frozen=True)
class Item:
    """Episode `index` of the data set `data`, read with `options` (JSON)."""

    data: str
    options: str
    index: int


@dataclass(frozen=True)
class Findings:
    """What was found out about an item; of one that cannot be read only `error`.

    Attributes:
        item_id: the episode's own, or the item's number.
        error: why it cannot be read; "" if it can.
        measures: see `measures.py`.
        fingerprint: hexadecimal, see `duplicates.py`.
        convention: of its actions.
        has_state: whether the robot felt anything.
        labels: names of what else is known of each frame.
        label_kinds: dtype and shape of each label in a frame; of findings from before they were looked at, none.
        action_dim: dimensions of its actions; likewise 0.
    """

    item_id: str
    error: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    convention: str = ""
    has_state: bool = False
    labels: list[str] = field(default_factory=list)
    label_kinds: dict[str, str] = field(default_factory=dict)
    action_dim: int = 0


def read_item(item: Item) -> Episode:
    """Read the episode.

    Raises:
        DataError: it is damaged; names the file.
    """
    return _opened(item.data, item.options)[item.index]


def count_items(data: str, options: str) -> int:
    """Number of episodes of a data set.

    Raises:
        DataError: no data set of a known format.
        ValueError: its reader has no such options.
    """
    try:
        return len(_opened(data, options))
    except TypeError as error:
        raise ValueError(f"options must be those of the reader of {data}: {error}") from error


def frame_rate(data: str, options: str) -> float:
    """Frames a second of a data set that `count_items` has opened."""
    return _opened(data, options).fps


def other_cameras(data: str, options: str) -> list[str]:
    """Cameras of a data set whose frames are not read; only LeRobot names them."""
    dataset = _opened(data, options)
    readers = [dataset.first, *dataset.others.values()] if isinstance(dataset, MultiView) else [dataset]
    lerobot = [reader for reader in readers if isinstance(reader, LeRobotReader)]
    read = {reader.camera for reader in lerobot}
    features = lerobot[0].info["features"] if lerobot else {}
    return [name for name, each in features.items() if each["dtype"] in ("video", "image") and name not in read]


def examine(item: Item) -> Findings:
    """Read and measure; what cannot be read is a finding, too.

    Raises:
        ImportError: a library to read with is not installed.
    """
    try:
        return _found(read_item(item))
    except ImportError:
        raise
    # Whatever a foreign file does to whichever library reads it (cv2.error, zlib.error, a KeyError of its tables, ...)
    # is to cost this item alone. The manifest says what it was, so that no fault of ours is hidden either.
    except Exception as error:  # noqa: BLE001
        return Findings(f"{Path(item.data).name}[{item.index}]", error=f"{type(error).__name__}: {error}")


def _found(episode: Episode) -> Findings:
    height, width = episode.frames.shape[1:3]
    small = episode.resized(*MEASURED)  # once, for all that look at it
    size = {"height": float(height), "width": float(width)}
    return Findings(
        item_id=episode.episode_id,
        measures=measure_frames(small.frames) | size | measure_robot(small),
        fingerprint=fingerprint(small.frames).tobytes().hex(),
        convention=episode.convention,
        has_state=episode.agent_pos is not None,
        labels=sorted(episode.labels),
        label_kinds={name: f"{label.dtype} {label.shape[1:]}" for name, label in sorted(episode.labels.items())},
        action_dim=episode.actions.shape[1],
    )


@lru_cache(maxsize=4)
def _opened(data: str, options: str) -> EpisodeSequence:
    return open_dataset(data, **json.loads(options))
