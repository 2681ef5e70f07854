"""Tar files in the layout of WebDataset: a sample's files lie side by side and share their name up to the first dot."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from wfm_core.data.files import DataError

RESOLUTIONS = (0, 128, 240, 360, 480, 720, 1080, 2160)
"""Shorter sides, pixels, from which on a clip lies in the next folder."""
ASPECTS = ((9, 16), (3, 4), (1, 1), (4, 3), (16, 9), (21, 9))
FRAMES = 256
"""Frames a folder spans."""


def shard_folder(height: int, width: int, num_frames: int) -> str:
    """Folder of a clip's shard, by resolution, nearest aspect and length, so that a batch of it needs no padding.

    Args:
        height: pixels.
        width: pixels.
        num_frames: of the clip.
    """
    resolution = max(each for each in RESOLUTIONS if each <= min(height, width))
    across, down = min(ASPECTS, key=lambda each: max(ratio := each[0] * height / (each[1] * width), 1 / ratio))
    first = num_frames // FRAMES * FRAMES
    return f"resolution_{resolution}/aspect_{across}_{down}/frames_{first}_{first + FRAMES - 1}"


def write_shard(file: BinaryIO, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write samples, a key and contents by suffix each, one at a time; the same bytes each time.

    Raises:
        ValueError: a key has a dot, at which readers would split it.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key, contents in samples:
            if "." in key:
                raise ValueError(f"a key must have no dot, got {key}")
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def read_shard(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read what `write_shard` or WebDataset wrote, sample by sample.

    Raises:
        DataError: it is damaged; names the file.
    """
    key, contents = "", {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name, _, suffix = member.name.partition(".")
                if name != key and contents:
                    yield key, contents
                    contents = {}
                key = name
                file = archive.extractfile(member)
                if file:
                    contents[suffix] = file.read()
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a readable shard: {error}") from error
    if contents:
        yield key, contents
