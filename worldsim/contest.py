"""A contest: every policy on the same episodes in imagination and in the twin, and what follows from the outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from worldsim.campaign import Job, LoadPolicy, MakeEnv, run_in_processes, run_job
from worldsim.evaluate import Cell, EpisodeRecord, Pair, Trace
from worldsim.leaderboard import IMAGINED, rank_policies
from worldsim.probes import PROBES
from worldsim.protocols import Policy
from worldsim.reward_card import false_success, head_on_truth
from worldsim.store import EpisodeStore

Judge = Callable[[Trace, str], bool]
"""(episode, instruction) -> whether it looks like success."""

TWIN_ROWS = 4
"""Rows of a worker's twin: enough to batch the policy, few enough that little idles when the last episodes end."""

_PROBE = "probe:"


@dataclass(frozen=True)
class World:
    """One of the two worlds.

    Attributes:
        name: `leaderboard.IMAGINED` or `leaderboard.TWIN`.
        hash: content hash of everything that decides an episode in it, but for the settings.
        settings: task name -> settings of its episodes (horizon, uncertainty limit), as canonical JSON.
        make_env: makes its envs; must be picklable for the twin.
    """

    name: str
    hash: str
    settings: Mapping[str, str]
    make_env: MakeEnv


@dataclass(frozen=True)
class Contest:
    """Who competes in what.

    Attributes:
        policies: policy name -> what `load_policy` takes.
        hashes: policy name -> content hash.
        instructions: task name -> language instruction.
        pairs: the (initial state, seed) pairs of every policy on every task.
        imagined: the imagined world.
        twin: the physics twin, or None.
        load_policy: loads a policy from its source; must be picklable if there is a twin.
        num_videos: the first so many pairs keep their video.
        num_probe_pairs: the first so many pairs are run by the policies that should fail.
    """

    policies: Mapping[str, str]
    hashes: Mapping[str, str]
    instructions: Mapping[str, str]
    pairs: tuple[Pair, ...]
    imagined: World
    twin: World | None
    load_policy: LoadPolicy
    num_videos: int = 0
    num_probe_pairs: int = 0


class Progress(Protocol):
    """Hears how far a contest is."""

    def begin(self, stage: str, total: int, finished: int) -> None:
        """Begin a stage of `total` units of which `finished` were there before."""
        ...

    def advance(self, where: str) -> None:
        """Count one unit."""
        ...

    def end(self) -> None:
        """End the stage."""
        ...


def episode_pairs(num_episodes: int, num_states: int, seed: int) -> tuple[Pair, ...]:
    """Return (initial state, seed) pairs: spread over the states, and the pairs of fewer episodes begin those of more.

    Raises:
        ValueError: a count below 1.
    """
    if num_episodes < 1 or num_states < 1:
        raise ValueError(f"num_episodes and num_states must be at least 1, got {num_episodes} and {num_states}")
    # A stride without a divisor in common with 24 visits every state before it repeats one.
    stride = 7 if num_states % 7 else 1
    return tuple(((k * stride) % num_states, seed + k) for k in range(num_episodes))


def hold_contest(
    contest: Contest,
    store: EpisodeStore,
    progress: Progress,
    *,
    num_envs: int,
    num_workers: int,
    judge: Judge | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[EpisodeRecord]]:
    """Evaluate what the store lacks and rank.

    Args:
        contest: who competes in what.
        store: holds what was evaluated before and keeps what is evaluated now.
        progress: hears how far it is.
        num_envs: most rows of an imagined env.
        num_workers: processes for the twin.
        judge: the success head, to be examined on the twin's videos; None leaves that out.
        seed: of the bootstrap.

    Returns:
        The ranking as `leaderboard.rank_policies` makes it, with "reward_card", and the episodes it rests on.

    Raises:
        ValueError: a policy or an env does not do as it should.
        OSError: the store cannot be written.
        RuntimeError: a worker process failed.
    """
    load = _Loader(contest.load_policy)
    policies = {source: load(source) for source in contest.policies.values()}
    tasks = list(contest.instructions)

    imagined_jobs = _jobs(contest, contest.imagined)
    _run_here(imagined_jobs, contest.imagined, policies, store, progress, num_envs)
    alone = rank_policies(_found(store, imagined_jobs), contest.hashes, tasks, contest.pairs, twin=False)
    leader = alone["policies"][0]["name"]  # whose actions are worth shuffling
    probe_jobs = _probe_jobs(contest, contest.imagined, leader)
    policies |= {job.source: load(job.source) for job in probe_jobs}
    _run_here(probe_jobs, contest.imagined, policies, store, progress, num_envs)

    twin_jobs, twin_probe_jobs = [], []
    if contest.twin:
        twin_jobs, twin_probe_jobs = _jobs(contest, contest.twin), _probe_jobs(contest, contest.twin, leader)
        jobs = [*twin_jobs, *twin_probe_jobs]
        _begin(progress, contest.twin.name, jobs, store)
        run_in_processes(
            jobs,
            contest.twin.make_env,
            load,
            store,
            num_envs=TWIN_ROWS,
            num_workers=num_workers,
            on_episode=lambda cell: progress.advance(f"{cell.policy} · {cell.task}"),
        )
        progress.end()

    records = _found(store, [*imagined_jobs, *twin_jobs])
    probes = _found(store, [*probe_jobs, *twin_probe_jobs])
    ranking = rank_policies(records, contest.hashes, tasks, contest.pairs, twin=contest.twin is not None, seed=seed)
    ranking["reward_card"] = {
        "false_success": false_success(probes, [f"{_PROBE}{name}" for name in PROBES]) if probes else None,
        "shuffled_policy": leader,
        "head_on_truth": _examine(judge, contest, _found(store, twin_jobs), store, progress) if judge else None,
    }
    return ranking, [*records, *probes]


@dataclass(frozen=True)
class _Loader:
    """Loads policies and probes."""

    load_policy: LoadPolicy

    def __call__(self, source: str) -> Policy:
        if not source.startswith(_PROBE):
            return self.load_policy(source)
        name, inner = source.removeprefix(_PROBE).split(":", 1)
        return PROBES[name](self.load_policy(inner))


def _jobs(contest: Contest, world: World) -> list[Job]:
    return [
        Job(
            Cell(name, contest.hashes[name], world.name, world.hash, task, world.settings[task]),
            source,
            instruction,
            contest.pairs,
            contest.pairs[: contest.num_videos],
        )
        for task, instruction in contest.instructions.items()
        for name, source in contest.policies.items()
    ]


def _probe_jobs(contest: Contest, world: World, leader: str) -> list[Job]:
    pairs = contest.pairs[: contest.num_probe_pairs]
    return [
        Job(
            Cell(
                f"{_PROBE}{probe}",
                f"{_PROBE}{probe}:{contest.hashes[leader]}" if probe == "shuffled" else f"{_PROBE}{probe}",
                world.name,
                world.hash,
                task,
                world.settings[task],
            ),
            f"{_PROBE}{probe}:{contest.policies[leader]}",
            instruction,
            pairs,
        )
        for task, instruction in contest.instructions.items()
        for probe in PROBES
        if pairs
    ]


def _found(store: EpisodeStore, jobs: Sequence[Job]) -> list[EpisodeRecord]:
    return [record for job in jobs for record in store.find(job.cell, job.pairs)]


def _begin(progress: Progress, stage: str, jobs: Sequence[Job], store: EpisodeStore) -> None:
    total = sum(len(job.pairs) for job in jobs)
    progress.begin(stage, total, total - sum(len(store.missing(job.cell, job.pairs)) for job in jobs))


def _run_here(
    jobs: Sequence[Job],
    world: World,
    policies: Mapping[str, Policy],
    store: EpisodeStore,
    progress: Progress,
    num_envs: int,
) -> None:
    if not jobs:
        return
    _begin(progress, world.name, jobs, store)
    for job in jobs:
        where = f"{job.cell.policy} · {job.cell.task}"
        run_job(job, world.make_env, policies[job.source], store, num_envs, lambda _, w=where: progress.advance(w))
    progress.end()


def _examine(
    judge: Judge, contest: Contest, records: Sequence[EpisodeRecord], store: EpisodeStore, progress: Progress
) -> dict[str, Any] | None:
    """Let the success head judge the twin's videos."""
    assert all(record.world != IMAGINED for record in records)
    videos = set(contest.pairs[: contest.num_videos])
    watched = [record for record in records if record.pair in videos]
    progress.begin("judging", len(watched), 0)
    judged = []
    for record in watched:
        trace = store.trace(record)
        if trace is not None:
            judged.append((judge(trace, contest.instructions[record.task]), record.success))
        progress.advance(f"{record.policy} · {record.task}")
    progress.end()
    return head_on_truth(judged)
