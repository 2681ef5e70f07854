"""Processes that do not get in each other's way: workers that end with their parent, folders that are one's own."""

import contextlib
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Generator
from pathlib import Path


def end_with_parent() -> None:
    """End this worker as soon as its parent is gone, however it went; an orphan would do a restarted command's work."""
    threading.Thread(target=_wait_and_exit, daemon=True).start()


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keep other processes from writing to a folder that exists.

    Raises:
        ValueError: another process does already.
    """
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use by another process; wait for it, or stop it") from error
        yield


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
