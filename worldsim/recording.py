"""Make a data set of many episodes in a folder of its own, by several processes, through any number of kills."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wfm_core.data.actions import CONTROL_HZ
from wfm_core.data.episode import Episode
from wfm_core.data.files import write_atomic
from wfm_core.data.lerobot_v3_writer import assemble_dataset, stage_episode, staged_indices
from wfm_core.data.video import ENCODINGS
from worldsim.processes import locked, run_all


def make_dataset(
    out: Path,
    make_episode: Callable[[int], Episode],
    num_episodes: int,
    *,
    command: str,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    encoding: str = "lossless",
    fps: float = CONTROL_HZ,
    workers: int = 0,
    executor: str = "local",
) -> None:
    """Make what is missing of a LeRobotDataset v3.0, and leave a finished one as it is.

    Args:
        out: its folder, new, empty, or begun by the same command with the same settings.
        make_episode: episode k, always the same; picklable if there are workers.
        num_episodes: of the whole.
        command: console script that makes it, without "worldsim-"; its settings are kept in `<command>.json`.
        settings: what decides the episodes.
        defaults: of settings that an older version did not know.
        encoding: of the video, one of `ENCODINGS`.
        fps: frames a second.
        workers: processes; 0 does everything in this one. Does not change what is made.
        executor: see `run_all`.

    Raises:
        ValueError: `out` holds something else, was begun with other settings, or is being written by another process.
        OSError: the disk is full; what is made so far is kept.
    """
    staging = out / ".staging"
    # Two workers on two cores: libraries that start a thread per core in each would only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LP_NUM_THREADS", "1")
    with claimed(out, command, settings, defaults):
        if not (out / "meta" / "info.json").exists():
            for leftover in staging.glob(".*.tmp"):
                leftover.unlink()
            done = set(staged_indices(staging))
            missing = [index for index in range(num_episodes) if index not in done]
            stage = partial(_make_and_stage, make_episode, staging, encoding, fps)
            with tqdm(total=num_episodes, initial=len(done), unit="episode", desc=command) as bar:
                for _ in run_all(stage, missing, workers, executor):
                    bar.update()
                bar.set_description("assembling")
                assemble_dataset(staging, out, encoding=ENCODINGS[encoding], fps=fps)
        if staging.exists():
            shutil.rmtree(staging)


def deciding(config: Any) -> dict[str, Any]:
    """The settings of a command, a dataclass, that decide what is made: all but where and by which processes."""
    return {name: value for name, value in asdict(config).items() if name not in ("out", "workers", "executor")}


@contextlib.contextmanager
def claimed(
    out: Path, command: str, settings: Mapping[str, Any], defaults: Mapping[str, Any], keep: Sequence[str] = ()
) -> Generator[None]:
    """Make sure that `out` is ours alone and was begun with the same settings; see `make_dataset` and `check_new`."""
    path = out / f"{command}.json"
    if path.exists():
        begun = {**defaults, **json.loads(path.read_text())}
        if differing := sorted(name for name in settings if settings[name] != begun[name]):
            raise ValueError(
                f"{out} was begun with other settings ("
                + ", ".join(f"{name}: {begun[name]}, now {settings[name]}" for name in differing)
                + "); choose another out, or repeat the settings"
            )
    else:
        check_new(out, command, keep)
        write_atomic(path, json.dumps(dict(settings), indent=2).encode())
    with locked(out):
        for leftover in out.glob(f".{command}.json.*.tmp"):
            leftover.unlink()
        yield


def check_new(out: Path, command: str, keep: Sequence[str] = ()) -> None:
    """Check that a folder is absent or empty but for what `keep` names, and for what a kill or a lock leaves.

    Raises:
        ValueError: it is not.
    """
    ours = (*keep, ".lock", f".{command}.json.*.tmp")
    if out.exists() and not all(any(path.match(name) for name in ours) for path in out.iterdir()):
        raise ValueError(f"out must be a new or empty folder, or one begun by worldsim-{command}, got {out}")


def _make_and_stage(
    make_episode: Callable[[int], Episode], staging: Path, encoding: str, fps: float, index: int
) -> int:
    stage_episode(staging, index, make_episode(index), ENCODINGS[encoding], fps)
    return index
