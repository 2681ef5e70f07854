"""Processes that do not get in each other's way: workers that end with their parent, folders that are one's own."""

import contextlib
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

_function: Callable[[Any], Any]  # of a worker process


def run_all[Argument, Result](
    function: Callable[[Argument], Result], arguments: Sequence[Argument], workers: int
) -> Iterator[Result]:
    """Call a picklable function with each argument; yields results in whatever order they come.

    Args:
        function: what to call.
        arguments: with which.
        workers: processes; 0 calls in this one, in order.

    Raises:
        BrokenProcessPool: a worker was killed; who it was and what the others were at is not known.
    """
    if workers == 0:
        yield from map(function, arguments)
        return
    # spawn: a forked child would inherit an OpenGL context and locked thread pools
    context = multiprocessing.get_context("spawn")
    num_workers = min(workers, max(len(arguments), 1))
    # The function goes to a worker once and not with every argument: it may hold a list of everything there is to do.
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_employ, initargs=(function,)) as pool:
        futures: list[Future[Any]] = [pool.submit(_work, argument) for argument in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


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


def _employ(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    end_with_parent()


def _work(argument: Any) -> Any:
    return _function(argument)


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
