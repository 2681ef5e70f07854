"""Processes that do not get in each other's way: workers that end with their parent, folders that are one's own."""

import contextlib
import fcntl
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

EXECUTORS = ("local", "ray")
AHEAD = 4
"""Arguments a worker has waiting, so that there may be any number of them, made when their turn comes."""

_function: Callable[[Any], Any]  # of a worker process


def run_all[Argument, Result](
    function: Callable[[Argument], Result], arguments: Iterable[Argument], workers: int, executor: str = "local"
) -> Iterator[Result]:
    """Call a picklable function with each argument; yields results in whatever order they come.

    Args:
        function: what to call.
        arguments: with which; any number, of which few are looked at ahead of time.
        workers: processes; 0 calls in this one, in order.
        executor: "local", or "ray" for Ray Data: on the cluster that RAY_ADDRESS names, or else here, with as many
            workers as it sees fit. What the function reads and writes must lie where all of its machines see it.

    Raises:
        BrokenProcessPool: a worker was killed; who it was and what the others were at is not known.
        ImportError: Ray is not installed.
    """
    if executor == "ray":
        yield from _run_on_ray(function, arguments)
        return
    if workers == 0:
        yield from map(function, arguments)
        return
    # spawn: a forked child would inherit an OpenGL context and locked thread pools
    context = multiprocessing.get_context("spawn")
    remaining = iter(arguments)
    first = list(islice(remaining, AHEAD * workers))
    # The function goes to a worker once and not with every argument: it may hold a list of everything there is to do.
    with ProcessPoolExecutor(
        min(workers, max(len(first), 1)), mp_context=context, initializer=_employ, initargs=(function,)
    ) as pool:
        running = {pool.submit(_work, argument) for argument in first}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(_work, argument) for argument in islice(remaining, len(done))}
                for future in done:
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


def _run_on_ray[Argument, Result](
    function: Callable[[Argument], Result], arguments: Iterable[Argument]
) -> Iterator[Result]:
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise ImportError("executor=ray needs Ray: pip install 'worldsim[ray]'") from error
    # Pickled here: what Ray makes of tuples and paths on its way through a table is its own affair.
    rows = [{"argument": pickle.dumps(argument)} for argument in arguments]
    if not rows:
        return
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    work = ray.data.from_items(rows).map(lambda row: {"result": function(pickle.loads(row["argument"]))})
    try:
        for row in work.iter_rows():
            yield row["result"]
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except RayError as error:
        raise BrokenProcessPool(f"a worker of Ray was killed: {error}") from error


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
