"""TFRecord files without TensorFlow: records with their checksums, and tf.train.Example parsed from the wire format.

Source: the TFRecord format (u64 length, masked CRC-32C of it, data, masked CRC-32C of them) and the protocol buffer
wire format, as published.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from wfm_core.data.files import DataError

Feature = list[bytes] | np.ndarray
"""Values of one feature: byte strings, or a float32 or int64 array."""

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_LANES = 1024


def record_offsets(path: Path) -> list[tuple[int, int]]:
    """Return (offset, length) of every record's data, reading the headers only.

    Raises:
        DataError: the file is missing, truncated, or a header is damaged; names the file and the record.
    """
    if not path.is_file():
        raise DataError(f"{path}: the record file is missing")
    size, position, offsets = path.stat().st_size, 0, []
    with open(path, "rb") as file:
        while position < size:
            file.seek(position)
            header = file.read(12)
            if len(header) < 12:
                raise DataError(f"{path}: record {len(offsets)} is cut off")
            length, checksum = struct.unpack("<QI", header)
            if checksum != _masked_crc(header[:8]):
                raise DataError(f"{path}: the header of record {len(offsets)} is damaged")
            if position + length + 16 > size:
                raise DataError(f"{path}: record {len(offsets)} is cut off")
            offsets.append((position + 12, length))
            position += length + 16
    return offsets


def read_record(path: Path, offset: int, length: int) -> bytes:
    """Read one record's data and check them.

    Raises:
        DataError: the data are damaged; names the file and the offset.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(length + 4)
    data = content[:length]
    if len(content) < length + 4 or struct.unpack("<I", content[length:])[0] != _masked_crc(data):
        raise DataError(f"{path}: the record at byte {offset} is damaged (checksum differs)")
    return data


def record_files(directory: Path, pattern: str) -> list[Path]:
    """Files of a folder and its sub-folders that fit a pattern, by path.

    Raises:
        DataError: there are none.
    """
    found = sorted(path for path in directory.rglob(pattern) if path.is_file())
    if not found:
        raise DataError(f"{directory}: no {pattern} files")
    return found


class Records:
    """The records of several files as one sequence, found by reading the headers only."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """List the records; raises as `record_offsets`."""
        self._paths = paths
        self._offsets = [record_offsets(path) for path in paths]
        self._starts = np.cumsum([0, *map(len, self._offsets)]).tolist()

    def __len__(self) -> int:
        """Number of records."""
        return self._starts[-1]

    def place(self, index: int) -> tuple[Path, int]:
        """The file of the record at 0 <= index < len(self), and its number there."""
        file = bisect_right(self._starts, index) - 1
        return self._paths[file], index - self._starts[file]

    def read(self, index: int) -> bytes:
        """Read the data of a record; raises as `read_record`."""
        file = bisect_right(self._starts, index) - 1
        return read_record(self._paths[file], *self._offsets[file][index - self._starts[file]])


def write_records(path: Path, records: list[bytes]) -> None:
    """Write a TFRecord file."""
    with open(path, "wb") as file:
        for data in records:
            header = struct.pack("<Q", len(data))
            file.write(header + struct.pack("<I", _masked_crc(header)))
            file.write(data + struct.pack("<I", _masked_crc(data)))


def parse_example(data: bytes) -> dict[str, Feature]:
    """Parse a serialised tf.train.Example.

    Returns:
        Feature name -> values.

    Raises:
        DataError: the bytes are not an Example.
    """
    try:
        return dict(_features(memoryview(data)))
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"not a tf.train.Example: {error}") from error


def _features(data: memoryview) -> Iterator[tuple[str, Feature]]:
    for _, features in fields(data, wanted=1):
        for _, entry in fields(features, wanted=1):
            (_, name), (_, value) = sorted(fields(entry), key=lambda field: field[0])
            for kind, values in fields(value):
                yield bytes(name).decode(), _values(kind, values)


def _values(kind: int, data: memoryview) -> Feature:
    if kind == 1:
        return [bytes(value) for _, value in fields(data)]
    if kind == 2:  # packed: one run of floats; unpacked: four bytes each
        return np.frombuffer(b"".join(bytes(value) for _, value in fields(data)), dtype="<f4")
    numbers: list[int] = []
    for _, value in fields(data):
        position = 0
        while position < len(value):
            number, position = varint(value, position)
            numbers.append(number)
    return np.array(numbers, dtype=np.uint64).astype(np.int64)  # negative numbers come as two's complement


def fields(data: memoryview, wanted: int | None = None) -> Iterator[tuple[int, memoryview]]:
    """Yield (field number, content) of a message; a varint field yields the varint's own bytes.

    Raises:
        ValueError: the bytes are not a message.
        IndexError: they end within a varint.
    """
    position = 0
    while position < len(data):
        tag, position = varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            length, position = varint(data, position)
            end = position + length
        elif wire == 0:
            _, end = varint(data, position)
        elif wire in (1, 5):
            end = position + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if end > len(data):
            raise ValueError("a field is cut off")
        if wanted in (None, number):
            yield number, data[position:end]
        position = end


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the number at `position`, and the position behind it.

    Raises:
        IndexError: the data end within it.
    """
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data`; long data are taken in parallel lanes, which a CRC's linearity lets one join."""
    crc, lane = 0xFFFFFFFF, len(data) // _LANES
    if lane >= 64:
        columns = np.frombuffer(data, dtype=np.uint8, count=lane * _LANES).reshape(_LANES, lane)
        lanes = np.zeros(_LANES, dtype=np.uint32)
        for k in range(lane):
            lanes = _TABLE[(lanes ^ columns[:, k]) & 0xFF] ^ (lanes >> 8)
        shift = _zeros_tables(lane)
        for part in lanes.tolist():
            crc = (
                shift[0][crc & 255] ^ shift[1][crc >> 8 & 255] ^ shift[2][crc >> 16 & 255] ^ shift[3][crc >> 24] ^ part
            )
        data = data[lane * _LANES :]
    for byte in data:
        crc = _BYTES[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _zeros_tables(count: int) -> list[list[int]]:
    """Tables that advance a CRC over `count` zero bytes: the new CRC is the xor of one entry for each of its bytes."""
    values = np.arange(256, dtype=np.uint32)
    states = np.stack([values << np.uint32(8 * byte) for byte in range(4)])
    for _ in range(count):
        states = _TABLE[states & 0xFF] ^ (states >> 8)
    return states.tolist()


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


_TABLE = _table()
_BYTES: list[int] = _TABLE.tolist()
