"""Evaluate many (policy, task) cells into a store: in this process, or in several worker processes."""

import contextlib
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from worldsim.evaluate import Cell, EpisodeRecord, Pair, VectorEnv, evaluate
from worldsim.processes import end_with_parent
from worldsim.protocols import Policy
from worldsim.store import EpisodeStore

MakeEnv = Callable[[str, int], VectorEnv]
"""(task name, rows) -> an env with autoreset DISABLED."""

LoadPolicy = Callable[[str], Policy]


@dataclass(frozen=True)
class Job:
    """A cell and the episodes of it that are wanted.

    Attributes:
        cell: the labels.
        source: what the policy is loaded from.
        instruction: the task's language instruction.
        pairs: the wanted (initial state, seed) pairs.
        traced: those whose video is kept.
    """

    cell: Cell
    source: str
    instruction: str
    pairs: tuple[Pair, ...]
    traced: tuple[Pair, ...] = ()


def num_rows(num_pairs: int, num_envs: int) -> int:
    """Return how many rows, at most `num_envs`, run `num_pairs` episodes in equally full waves: 24 on 16 -> 12."""
    return -(-num_pairs // -(-num_pairs // num_envs))


def run_job(
    job: Job,
    make_env: MakeEnv,
    policy: Policy,
    store: EpisodeStore,
    num_envs: int,
    on_episode: Callable[[EpisodeRecord], None],
) -> None:
    """Evaluate what the store lacks of a job, storing each episode as soon as it ends.

    An episode turns out the same however often the job was killed: round-off depends on how many rows are stepped
    together, so that number is the whole job's, whatever is left of it.

    Raises:
        ValueError: the policy or the env does not do as it should.
        OSError: the store cannot be written.
    """
    missing = store.missing(job.cell, job.pairs)
    if not missing:
        return

    def keep(record: EpisodeRecord, trace: Any) -> None:
        store.append(record, trace)
        on_episode(record)

    env = make_env(job.cell.task, num_rows(len(job.pairs), num_envs))
    try:
        evaluate(policy, env, missing, job.cell, instruction=job.instruction, on_record=keep, traced=job.traced)
    finally:
        env.close()


def run_in_processes(
    jobs: Sequence[Job],
    make_env: MakeEnv,
    load_policy: LoadPolicy,
    store: EpisodeStore,
    *,
    num_envs: int,
    num_workers: int,
    on_episode: Callable[[Cell], None],
) -> None:
    """Evaluate jobs in spawned worker processes of one torch thread each; the store is reloaded at the end.

    Args:
        jobs: one at a time goes to a worker.
        make_env: makes an env in the worker; picklable, as is `load_policy`.
        load_policy: loads a job's policy from its source in the worker.
        store: where the episodes go; each worker writes a file of its own.
        num_envs: most rows of an env.
        num_workers: most processes.
        on_episode: called here whenever an episode was stored.

    Raises:
        RuntimeError: a worker failed or was killed; says on which cell and why. Finished episodes are safe.
    """
    jobs = [job for job in jobs if store.missing(job.cell, job.pairs)]
    context = multiprocessing.get_context("spawn")
    todo, events = context.Queue(), context.Queue()
    for job in jobs:
        todo.put(job)
    arguments = (todo, events, make_env, load_policy, str(store.store_dir), num_envs)
    workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(min(num_workers, len(jobs)))]
    for _ in workers:
        todo.put(None)
    with _one_thread_each():
        for worker in workers:
            worker.start()
    try:
        unfinished = len(jobs)
        while unfinished:
            try:
                kind, cell, message = events.get(timeout=0.5)
            except queue.Empty:
                _check_alive(workers)
                continue
            if kind == "episode":
                on_episode(cell)
            elif kind == "job":
                unfinished -= 1
            else:
                where = f"policy {cell.policy!r} on task {cell.task!r} in the {cell.world} world"
                raise RuntimeError(f"the evaluation of {where} failed: {message}")
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join()
        store.reload()


@contextlib.contextmanager
def _one_thread_each() -> Generator[None]:
    """Let child processes inherit one thread for torch and for software OpenGL: two times two crawl on two cores."""
    names = ("OMP_NUM_THREADS", "LP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_alive(workers: Sequence[Any]) -> None:
    for worker in workers:
        if worker.exitcode not in (None, 0):
            reason = f"by signal {-worker.exitcode}" if worker.exitcode < 0 else f"with status {worker.exitcode}"
            raise RuntimeError(
                f"a worker process ended {reason} (out of memory, perhaps: fewer workers need less); the finished "
                "episodes are safe, and the same command goes on from there"
            )


def _work(todo: Any, events: Any, make_env: MakeEnv, load_policy: LoadPolicy, store_dir: str, num_envs: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once; its finished episodes are on the disk
    load = cache(load_policy)
    with EpisodeStore(store_dir) as store:
        while (job := todo.get()) is not None:
            cell = job.cell
            try:
                run_job(
                    job, make_env, load(job.source), store, num_envs, lambda _, c=cell: events.put(("episode", c, ""))
                )
            except (ValueError, OSError, RuntimeError, ImportError) as error:
                events.put(("error", cell, f"{type(error).__name__}: {error}"))
                return
            events.put(("job", cell, ""))
