"""What readers raise, and how files are written so that a kill or a full disk loses nothing."""

import os
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """A data set is incomplete or damaged; the message names the file and the frame, record or episode."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that the file is either whole or absent, whatever happens meanwhile.

    Raises:
        OSError: the disk is full or the place cannot be written; names the file and says what is left there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        left = "the previous file is kept" if path.exists() else "nothing is left of it"
        raise OSError(error.errno, f"could not write {path} ({error.strerror}); {left}") from error


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file that is either whole or absent; arrays may be larger than memory has room for twice."""
    temporary = path.with_name(path.name + ".tmp.npy")
    np.save(temporary, array)
    temporary.replace(path)
