"""Episodes on disk: append-only, keyed by content, safe to kill, easy to merge.

A store is a folder: `episodes/*.jsonl`, one file a writing process and one line an episode, each line flushed to the
disk before the next episode begins; and `traces/<key>.mp4` and `.npz` for episodes whose video was kept. Nothing is
ever rewritten, so stores of several machines merge by copying, and a line torn by a kill costs that one episode.
"""

import io
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from tasks.task import REWARD_TERMS
from wfm_core.data.actions import CONTROL_HZ
from wfm_core.data.files import write_atomic
from wfm_core.data.video import decode_video, encode_video
from worldsim.evaluate import Cell, EpisodeRecord, Pair, Trace

logger = logging.getLogger(__name__)


class EpisodeStore:
    """The episodes evaluated so far.

    Reads every line at construction and writes to a file of its own, made at the first `append`; what other processes
    append meanwhile is seen after `reload`.
    """

    def __init__(self, store_dir: str | Path) -> None:
        """Open a store, making its folder if need be.

        Raises:
            ValueError: a line other than a file's last is damaged; names file and line.
        """
        self.store_dir = Path(store_dir)
        self._episodes_dir = self.store_dir / "episodes"
        self._traces_dir = self.store_dir / "traces"
        self._episodes_dir.mkdir(parents=True, exist_ok=True)
        self._traces_dir.mkdir(exist_ok=True)
        self._file: int | None = None
        self._file_path = self._episodes_dir / f"{uuid.uuid4().hex}.jsonl"
        self._records: dict[str, EpisodeRecord] = {}
        self.reload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._records)

    def reload(self) -> None:
        """Read all files again."""
        records: dict[str, EpisodeRecord] = {}
        for path in sorted(self._episodes_dir.glob("*.jsonl")):
            for record in _read_lines(path):
                _add(records, record)
        self._records = records

    def append(self, record: EpisodeRecord, trace: Trace | None = None) -> None:
        """Add an episode; on return it is on the disk.

        Raises:
            OSError: it could not be written (a full disk, say); the store holds what it held before.
        """
        if trace is not None:
            self._write_trace(record, trace)
        line = json.dumps(asdict(record), sort_keys=True).encode() + b"\n"
        try:
            if self._file is None:
                self._file = os.open(self._file_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                _sync_dir(self._episodes_dir)
            size = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):  # a filling disk takes part of a line before it refuses
                    written += os.write(self._file, line[written:])
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
        except OSError as error:
            raise self._explained(error, self._file_path) from error
        _add(self._records, record)

    def records(self) -> list[EpisodeRecord]:
        """Return all episodes, sorted by policy, task, world, initial state and seed."""
        return sorted(self._records.values(), key=lambda r: (r.policy, r.task, r.world, r.initial_state, r.seed))

    def find(self, cell: Cell, pairs: Iterable[Pair]) -> list[EpisodeRecord]:
        """Return the episodes of a cell that are there, in the order of `pairs` and under the cell's names."""
        found = (self._records.get(cell.key(pair)) for pair in pairs)
        return [replace(record, policy=cell.policy, world=cell.world) for record in found if record]

    def missing(self, cell: Cell, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the pairs of a cell that are still to be evaluated, in order."""
        return [pair for pair in pairs if cell.key(pair) not in self._records]

    def has_trace(self, record: EpisodeRecord) -> bool:
        """Tell whether `trace` has anything to return."""
        return all(path.exists() for path in self._trace_paths(record))

    def trace(self, record: EpisodeRecord) -> Trace | None:
        """Return what was seen in an episode, or None if that was not kept.

        Raises:
            ValueError: its file is damaged; names it.
        """
        video_path, arrays_path = self._trace_paths(record)
        if not self.has_trace(record):
            return None
        try:
            with np.load(arrays_path, allow_pickle=False) as arrays:
                return Trace(decode_video(video_path), arrays["agent_pos"], arrays["actions"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            message = f"the video of an episode is damaged; delete {video_path} to go on without it: {error}"
            raise ValueError(message) from error

    def merge(self, *others: "EpisodeStore") -> int:
        """Add the episodes of other stores; one that is in several counts once.

        Returns:
            How many episodes were new.

        Raises:
            OSError: as `append`; merging again goes on where it stopped.
        """
        num_new = 0
        for other in others:
            for key, record in other._records.items():
                if key not in self._records:
                    for source, target in zip(other._trace_paths(record), self._trace_paths(record), strict=True):
                        if source.exists():
                            self._write(target, source.read_bytes())
                    self.append(record)
                    num_new += 1
                else:
                    _add(self._records, record)  # reports a contradiction
        return num_new

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _trace_paths(self, record: EpisodeRecord) -> tuple[Path, Path]:
        key = record.key(record.pair)
        return self._traces_dir / f"{key}.mp4", self._traces_dir / f"{key}.npz"

    def _write_trace(self, record: EpisodeRecord, trace: Trace) -> None:
        video_path, arrays_path = self._trace_paths(record)
        buffer = io.BytesIO()
        np.savez(buffer, agent_pos=trace.agent_pos, actions=trace.actions)
        self._write(arrays_path, buffer.getvalue())
        self._write(video_path, encode_video(trace.frames, CONTROL_HZ))

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomic(path, content)
        except OSError as error:
            raise self._explained(error, path) from error

    def _explained(self, error: OSError, path: Path) -> OSError:
        return OSError(
            error.errno,
            f"could not write an episode ({error.strerror}); the {len(self)} episodes before it are safe, and the same "
            "command goes on from there",
            str(path),
        )


def write_parquet(records: Sequence[EpisodeRecord], path: Path) -> None:
    """Write episodes to a Parquet table, one row an episode; reward terms become columns `final_*` and `mean_*`.

    Raises:
        OSError: it could not be written; names the file.
    """
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    for record in records:
        row: dict[str, Any] = asdict(record) | {"key": record.key(record.pair)}
        for kind in ("final", "mean"):
            terms: dict[str, float] = row.pop(f"{kind}_terms")
            row.update({f"{kind}_{name}": terms.get(name) for name in REWARD_TERMS})
        rows.append(row)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    write_atomic(path, buffer.getvalue())


def _read_lines(path: Path) -> Iterator[EpisodeRecord]:
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # what follows the last newline: nothing, unless a kill tore it
    if torn:
        logger.warning("%s ends in an unfinished line; that episode will be evaluated again", path)
    for number, line in enumerate(lines, start=1):
        try:
            yield EpisodeRecord(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not torn:  # a power cut can leave the newline and not what precedes it
                logger.warning("%s ends in a damaged line; that episode will be evaluated again", path)
                return
            raise ValueError(f"{path}, line {number} must be an episode record: {error}") from error


def _add(records: dict[str, EpisodeRecord], record: EpisodeRecord) -> None:
    """Add a record; of two with one key the choice does not depend on the order they come in."""
    key = record.key(record.pair)
    known = records.setdefault(key, record)
    if known is record:
        return
    if (known.success, known.length, known.end_reason) != (record.success, record.length, record.end_reason):
        logger.warning(
            "two results of one episode differ (%s, %s, %s, initial state %d, seed %d): %s and %s; the world or the "
            "policy is not deterministic",
            *(known.policy, known.world, known.task, known.initial_state, known.seed),
            known.end_reason,
            record.end_reason,
        )
    records[key] = min(known, record, key=lambda r: json.dumps(asdict(r), sort_keys=True))


def _sync_dir(directory: Path) -> None:
    """Make a new directory entry durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
