"""What readers raise, and how files are written so that a kill or a full disk loses nothing."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class DataError(ValueError):
    """A data set is incomplete or damaged; the message names the file and the frame, record or episode."""


def listing(folder: Path) -> str:
    """Fingerprint of the files under a folder, by name and size, hexadecimal; "" if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = "".join(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n" for path in files)
    return hashlib.sha256(sizes.encode()).hexdigest() if files else ""


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content`, or what it writes, to `path` so that the file is either whole or absent, whatever happens.

    Raises:
        OSError: the disk is full or the place cannot be written; names the file and says what is left there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        left = "the previous file is kept" if path.exists() else "nothing is left of it"
        # numpy's errors have a message only
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error}); {left}") from error
