"""Open a data set of any known format as a sequence of episodes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wfm_core.data.bridge_numpy import BridgeNumpyReader
from wfm_core.data.bridge_raw import ACTIONS, STATES, BridgeRawReader
from wfm_core.data.bridge_tfrecord import BridgeTfrecordReader, is_bridge_tfrecord
from wfm_core.data.clip_pairs import ClipPairReader
from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.irasim import IrasimReader
from wfm_core.data.lerobot import LeRobotReader, read_info
from wfm_core.data.lerobot_v2 import LeRobotV2Reader
from wfm_core.data.lerobot_v3 import LeRobotV3Reader
from wfm_core.data.rlds import RldsReader
from wfm_core.data.tfrecord import Records, parse_example, record_files
from wfm_core.data.video_folder import SUFFIXES, VideoFolderReader


def open_lerobot(path: Path, **options: Any) -> LeRobotReader:
    """Open a LeRobot data set of either version that is read; options as for `LeRobotReader`.

    Raises:
        DataError: of another version, or its meta data are damaged; names the file.
    """
    version = read_info(path)["codebase_version"]
    for reader in (LeRobotV3Reader, LeRobotV2Reader):
        if version.startswith(f"v{reader.version}"):
            return reader(path, **options)
    raise DataError(f"{path / 'meta' / 'info.json'}: LeRobot {version}, only v2.x and v3.x are read")


RECORDS = "*.tfrecord*"


def open_records(path: Path, **options: Any) -> EpisodeSequence:
    """Open TFRecords: RLDS, or BridgeData V2 processed into tensors if the first readable one is of that kind.

    Raises:
        DataError: a file is damaged; names it and the record.
    """
    records = Records(record_files(path, RECORDS)[:1])
    for index in range(len(records)):
        try:
            features = parse_example(records.read(index))
        except DataError:
            continue
        return (BridgeTfrecordReader if is_bridge_tfrecord(features) else RldsReader)(path, **options)
    return RldsReader(path, **options)


READERS: dict[str, tuple[tuple[str, ...], Callable[..., EpisodeSequence]]] = {
    "lerobot": (("meta/info.json",), open_lerobot),
    "irasim": (("annotation/*/*.json",), IrasimReader),
    "tfrecord": ((f"**/{RECORDS}",), open_records),
    "bridge_raw": ((f"**/{STATES}", f"**/{ACTIONS}"), BridgeRawReader),
    "bridge_numpy": (("**/out.npy",), BridgeNumpyReader),
    "clip_pairs": (("**/*.npz",), ClipPairReader),
    "video_folder": (tuple(f"**/*{suffix}" for suffix in SUFFIXES), VideoFolderReader),
}
"""Format -> (glob patterns, one of which its folders match, its reader); the first format that matches is taken."""


class MultiView(EpisodeSequence):
    """A data set as several cameras saw it; what all but the first show becomes the episodes' `views`."""

    def __init__(self, first: EpisodeSequence, others: Mapping[str, EpisodeSequence]) -> None:
        """Join readers of the same episodes, the others by the name of their view."""
        self.first, self.others, self.fps = first, others, first.fps

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.first)

    def _read(self, index: int) -> Episode:
        return replace(self.first[index], views={name: other[index].frames for name, other in self.others.items()})


def open_dataset(path: Path | str, *, views: Mapping[str, Any] | None = None, **options: Any) -> EpisodeSequence:
    """Open a data set, recognising its format.

    Args:
        path: the data set's root.
        views: name -> camera, as the format's reader takes it, of further cameras to be read.
        options: passed to the format's reader (camera, split, convention, ...).

    Returns:
        Its episodes; frames are read on access.

    Raises:
        DataError: no such folder, no known format, or damaged meta data; names the path and what is there.
        TypeError: the format's reader has no such option.
    """
    if views:
        others = {name: open_dataset(path, **options | {"camera": camera}) for name, camera in views.items()}
        return MultiView(open_dataset(path, **options), others)
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    for patterns, reader in READERS.values():
        if any(next(path.glob(pattern), None) is not None for pattern in patterns):
            return reader(path, **options)
    found = Counter(file.suffix or "(no suffix)" for file in path.rglob("*") if file.is_file())
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(6)) or "nothing"
    known = ", ".join(f"{name} ({', '.join(patterns)})" for name, (patterns, _) in READERS.items())
    raise DataError(f"{path}: no known data set format; found {kinds}; known are {known}")
