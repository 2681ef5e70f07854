"""A decoded copy of episodes on disk for training: frames as one uint8 array that the page cache serves.

Reading a clip is slicing a memory map; nothing is decoded. A cache folder holds frames.npy, one array a column
(actions.npy, agent_pos.npy, label.<name>.npy), all with one row a frame, and index.json with the episodes, the files'
sizes and a checksum of itself.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from wfm_core.data.actions import AGENT_POS_DIM
from wfm_core.data.episode import UNKNOWN_ACTIONS, Episode
from wfm_core.data.files import DataError

_INDEX = "index.json"


class ClipCache:
    """Random access to clips of cached episodes.

    Attributes:
        frames: (N, H, W, 3) uint8 memory map, all episodes end to end.
        columns: name -> (N, ...) array in memory: "actions", `Episode.action_rows` (N, 7) float32 or another robot's,
            "agent_pos" (N, 7) float32, both NaN where unknown, and every label.
        starts: (E,) int64, first row of each episode.
        lengths: (E,) int64, frames of each episode.
        episodes: E dicts with episode_id, instruction, convention, command_lag and meta.
    """

    def __init__(self, directory: Path | str) -> None:
        """Open a cache.

        Raises:
            DataError: absent, incomplete or damaged; names the file.
        """
        self.directory = Path(directory)
        index_path = self.directory / _INDEX
        try:
            index = json.loads(index_path.read_text())
            body, digest = index["body"], index["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{index_path}: not a clip cache ({error})") from error
        if _digest(body) != digest:
            raise DataError(f"{index_path}: damaged (checksum differs); delete {self.directory} and build it again")
        for name, size in body["sizes"].items():
            path = self.directory / name
            if not path.is_file() or path.stat().st_size != size:
                found = path.stat().st_size if path.is_file() else "nothing"
                raise DataError(
                    f"{path}: must have {size} bytes, found {found}; delete {self.directory}, build it again"
                )
        # As a plain array the map is sliced several times faster than as np.memmap.
        self.frames: np.ndarray = np.asarray(np.load(self.directory / "frames.npy", mmap_mode="r"))
        self.columns = {
            name.removesuffix(".npy").removeprefix("label."): np.load(self.directory / name)
            for name in body["sizes"]
            if name != "frames.npy"
        }
        self.episodes: list[dict] = body["episodes"]
        self.lengths = np.array(body["lengths"], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.fingerprint: str = body["fingerprint"]

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def subset(self, episodes: Iterable[int]) -> "ClipCache":
        """Some episodes, copied into memory; nothing can be kept beside these."""
        part, chosen = copy.copy(self), np.fromiter(episodes, np.int64)
        rows = np.concatenate([np.arange(self.starts[k], self.starts[k] + self.lengths[k]) for k in chosen])
        part.directory = self.directory / "subset"  # there is no such folder
        part.frames, part.columns = self.frames[rows], {name: column[rows] for name, column in self.columns.items()}
        part.episodes, part.lengths = [self.episodes[k] for k in chosen], self.lengths[chosen]
        part.starts = np.cumsum(part.lengths) - part.lengths
        return part

    def require_actions(self) -> None:
        """Check that this data can teach what actions do.

        Raises:
            ValueError: the actions of an episode are unknown.
        """
        if any(episode["convention"] == UNKNOWN_ACTIONS for episode in self.episodes):
            raise ValueError(f"{self.directory}: must have actions, got frames only; a tokenizer can be trained on it")

    def clip(self, episode: int, start: int, length: int) -> dict[str, np.ndarray]:
        """Return a window of one episode without copying.

        Args:
            episode: index of the episode.
            start: first frame within it.
            length: number of frames L.

        Returns:
            "frames" (L, H, W, 3) uint8, "actions" (L, 7) float32 (row t is sent after frame t), "agent_pos" (L, 7) and
            the labels (L, ...): views; those of the frames are read-only.

        Raises:
            IndexError: the episode has no such window.
        """
        if not 0 <= start <= start + length <= self.lengths[episode]:
            raise IndexError(
                f"episode {episode} has {self.lengths[episode]} frames, got a clip {start} to {start + length}"
            )
        row = int(self.starts[episode]) + start
        window = slice(row, row + length)
        return {"frames": self.frames[window]} | {name: column[window] for name, column in self.columns.items()}

    def batch(self, rows: np.ndarray, length: int, columns: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Copy clips that start at the given rows into one batch.

        Args:
            rows: (B,) int64 first rows, as `ClipSampler` draws them; each clip must stay within its episode.
            length: number of frames L of each clip.
            columns: names to return beside the frames; None returns all.

        Returns:
            "frames" (B, L, H, W, 3) uint8, "actions" (B, L, 7), "agent_pos" (B, L, 7), labels (B, L, ...), and
            "episode" (B,) int64.

        Raises:
            IndexError: a clip leaves its episode.
        """
        rows = np.asarray(rows, dtype=np.int64)
        episode = np.searchsorted(self.starts, rows, side="right") - 1
        if rows.size and (rows.min() < 0 or (rows + length > self.starts[episode] + self.lengths[episode]).any()):
            raise IndexError(f"clips of {length} frames must stay within their episodes")
        frames = np.empty((len(rows), length, *self.frames.shape[1:]), dtype=np.uint8)
        for k, row in enumerate(rows):
            frames[k] = self.frames[row : row + length]
        window = rows[:, None] + np.arange(length)
        names = self.columns if columns is None else columns
        return {"frames": frames, "episode": episode} | {name: self.columns[name][window] for name in names}


class Joined:
    """Arrays of several caches end to end, memory maps among them, of which nothing is read but what is asked for."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.first_rows = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        """Rows of all."""
        return int(self.first_rows[-1])

    def part_of(self, rows: np.ndarray) -> np.ndarray:
        """Index (B,) of the array in which rows (B, T) are, those of a clip all in one."""
        return np.searchsorted(self.first_rows, rows[:, 0], side="right") - 1

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Copy rows (B, T), those of a clip all of one array: (B, T, ...)."""
        pairs = zip(self.part_of(rows), rows, strict=True)
        return np.stack([self.parts[k][mine - self.first_rows[k]] for k, mine in pairs])


def build_clip_cache(
    episodes: Iterable[Episode], directory: Path | str, *, fingerprint: str = "", mixed_conventions: bool = False
) -> ClipCache:
    """Decode episodes once into a new cache folder.

    Args:
        episodes: what to store; read one at a time. All need the same frame size and labels.
        directory: the folder to make; appears only when complete.
        fingerprint: says what the cache was built from; kept for the caller to compare.
        mixed_conventions: allow episodes of different action convention or command lag.

    Returns:
        The opened cache.

    Raises:
        ValueError: `directory` exists, there are no episodes, or they do not go together.
        OSError: the disk is full; nothing is left in `directory`.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"the cache folder must not exist yet, got {directory}")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        body = _write(episodes, temporary, mixed_conventions) | {"fingerprint": fingerprint}
        (temporary / _INDEX).write_text(json.dumps({"body": body, "sha256": _digest(body)}))
        try:
            os.replace(temporary, directory)
        except OSError:
            if not directory.exists() or ClipCache(directory).fingerprint != fingerprint:
                raise  # else another process has been quicker, with the same
    except OSError as error:
        raise OSError(
            error.errno, f"could not write the clip cache {directory} ({error.strerror or error}); nothing is kept"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ClipCache(directory)


def _write(episodes: Iterable[Episode], directory: Path, mixed_conventions: bool) -> dict:
    entries: list[dict] = []
    lengths: list[int] = []
    columns: dict[str, list[np.ndarray]] = {}
    source: tuple[str, int] | None = None
    shape: tuple[int, ...] = ()
    frames_path = directory / "frames.npy"
    with open(frames_path, "wb") as file:
        for episode in episodes:
            length = len(episode.frames)
            if source is None:
                source, shape = (episode.convention, episode.command_lag), episode.frames.shape[1:]
                _write_header(file, 0, shape)
            if (episode.convention, episode.command_lag) != source and not mixed_conventions:
                raise ValueError(
                    f"all episodes must have the action convention and command lag {source}, got "
                    f"{(episode.convention, episode.command_lag)} in {episode.episode_id}; worldsim-convert "
                    "relabel=true makes them alike, mixed_conventions=True allows it"
                )
            if episode.frames.shape[1:] != shape:
                raise ValueError(f"frames must be {shape}, got {episode.frames.shape[1:]} in {episode.episode_id}")
            file.write(np.ascontiguousarray(episode.frames).data)
            unknown = np.full((length, AGENT_POS_DIM), np.nan, dtype=np.float32)
            rows = {
                "actions": episode.action_rows,
                "agent_pos": unknown if episode.agent_pos is None else episode.agent_pos,
            }
            rows |= {f"label.{name}": label for name, label in episode.labels.items()}
            if columns and columns.keys() != rows.keys():
                raise ValueError(f"labels must be {sorted(columns)}, got {sorted(rows)} in {episode.episode_id}")
            for name, value in rows.items():
                columns.setdefault(name, []).append(value)
            lengths.append(length)
            entries.append(
                {
                    "episode_id": episode.episode_id,
                    "instruction": episode.instruction,
                    "convention": episode.convention,
                    "command_lag": episode.command_lag,
                    "meta": episode.meta,
                }
            )
        if source is None:
            raise ValueError("a clip cache needs at least one episode, got none")
        file.seek(0)
        _write_header(file, sum(lengths), shape)
        file.flush()
        os.fsync(file.fileno())
    for name, parts in columns.items():
        np.save(directory / f"{name}.npy", np.concatenate(parts))
    sizes = {path.name: path.stat().st_size for path in sorted(directory.glob("*.npy"))}
    return {"sizes": sizes, "lengths": lengths, "episodes": entries}


def _write_header(file, rows: int, shape: tuple[int, ...]) -> None:
    # numpy pads the header so that the first dimension can grow in place: writing it again when N is known is safe.
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)})


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
