"""Read BridgeData V2 as processed into TFRecords: an Example a trajectory, each of its features a serialised tensor.

They hold what the numpy copies hold (see `bridge_numpy.py`), under `observations/images0` (T, H, W, 3),
`observations/state` and `actions` (T, 7), the same of `next_observations`, and `language`, a list of texts. The frame
after the last action is the last next observation. Of the delay of what they mix the same holds, too.

Source: the messages TensorProto, TensorShapeProto and the enum DataType of TensorFlow, as published.
"""

from pathlib import Path

import numpy as np

from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.tfrecord import Feature, Records, fields, parse_example, record_files, varint

_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "|u1", 9: "<i8"}
_STRING = 7


class BridgeTfrecordReader(EpisodeSequence):
    """The trajectories of all records under a folder, by path."""

    convention = "commanded"

    def __init__(
        self, directory: Path | str, *, camera: int = 0, split: str | None = None, command_lag: int = 1
    ) -> None:
        """Index the records by reading their headers.

        Args:
            directory: searched with its sub-folders for *.tfrecord*.
            camera: number k of the images `images<k>`.
            split: "train" or "val", the folder in which a file lies; None takes both.
            command_lag: control steps by which motion trails the action; 1 of recordings since 2021-07-23, 0 of those
                before.

        Raises:
            DataError: there are no files, or a damaged one; names the file and the record.
        """
        self.directory, self.camera, self.command_lag = Path(directory), camera, command_lag
        self._records = Records(record_files(self.directory, f"{split or '**'}/*.tfrecord*"))

    def __len__(self) -> int:
        """Number of trajectories."""
        return len(self._records)

    def _read(self, index: int) -> Episode:
        """Read one trajectory.

        Raises:
            DataError: its record is damaged, or lacks something; names the file and the record.
        """
        path, record = self._records.place(index)
        data = self._records.read(index)
        try:
            features = parse_example(data)
            frames, states = (self._observed(features, name) for name in (f"images{self.camera}", "state"))
            texts = parse_tensor(features, "language") if "language" in features else []
            return Episode(
                frames=frames,
                actions=_numbers(features, "actions").astype(np.float32),
                agent_pos=states.astype(np.float32),
                instruction=texts[0].decode(errors="replace").strip() if isinstance(texts, list) and texts else "",
                episode_id=f"{path.relative_to(self.directory).as_posix().replace('.tfrecord', '')}-{record:05d}",
                convention=self.convention,
                command_lag=self.command_lag,
            )
        except (KeyError, ValueError) as error:
            there = ", ".join(sorted(features)) if isinstance(error, KeyError) else ""
            message = f"feature {error} is missing; there are {there}" if there else str(error)
            raise DataError(f"{path}, record {record}: {message}") from error

    def _observed(self, features: dict[str, Feature], name: str) -> np.ndarray:
        last = _numbers(features, f"next_observations/{name}")[-1:]
        return np.concatenate([_numbers(features, f"observations/{name}"), last])


def is_bridge_tfrecord(features: dict[str, Feature]) -> bool:
    """Whether an Example is such a trajectory, and not an episode of RLDS."""
    return "actions" in features and any(name.startswith("observations/images") for name in features)


def parse_tensor(features: dict[str, Feature], name: str) -> np.ndarray | list[bytes]:
    """Parse the serialised tensor that a feature holds.

    Returns:
        An array of its shape and type, or the texts in order.

    Raises:
        KeyError: there is no such feature.
        ValueError: it is not one tensor of a type that such files have; names the feature.
    """
    try:
        (message,) = features[name]
        kind, sizes, content, texts = 0, [], b"", []
        for number, value in fields(memoryview(message)):
            if number == 1:
                kind, _ = varint(value, 0)
            elif number == 2:
                sizes = [_size(dimension) for _, dimension in fields(value, wanted=2)]
            elif number == 4:
                content = bytes(value)
            elif number == 8:
                texts.append(bytes(value))
        if kind == _STRING:
            return texts
        if kind not in _DTYPES:
            raise ValueError(f"its type is {kind}, must be {_STRING} or one of {sorted(_DTYPES)}")
        return np.frombuffer(content, _DTYPES[kind]).reshape(sizes)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{name} is not a readable tensor ({error})") from error


def _size(dimension: memoryview) -> int:
    return next((varint(value, 0)[0] for _, value in fields(dimension, wanted=1)), 0)


def _numbers(features: dict[str, Feature], name: str) -> np.ndarray:
    tensor = parse_tensor(features, name)
    if isinstance(tensor, list):
        raise ValueError(f"{name} must be numbers, got texts")
    return tensor
