"""Worker processes that do not outlive who started them."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this worker as soon as its parent is gone, however it went; an orphan would do a restarted command's work."""
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
