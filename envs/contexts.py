"""Where imagination starts: the twin's initial frames, shipped with the package, or frames of any data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from envs.spaces import FRAME_SHAPE
from tasks.task import Task
from wfm_core.data.actions import ACTION_DIM
from wfm_core.data.clip_cache import ClipCache
from wfm_core.data.episode import UNKNOWN_ACTIONS, Episode
from wfm_core.data.files import DataError
from wfm_core.data.readers import open_dataset
from wfm_core.data.video import resize_frames

CONTEXTS_PATH = Path(__file__).parent / "assets" / "contexts.npz"
"""For each task: "<task>.png" (all bytes, one image after the other), "<task>.ends" (K,), "<task>.agent_pos" (K, 7)."""


@dataclass(frozen=True)
class Context:
    """K beginnings of T >= 1 frames, one for each initial state; imagination goes on from the last frame.

    Attributes:
        frames: (K, T, H, W, 3) uint8.
        actions: (K, T - 1, 7) float32 between the frames, physical units.
        agent_pos: (K, T, 7) float32, or None where the source has no proprioception.
    """

    frames: np.ndarray
    actions: np.ndarray
    agent_pos: np.ndarray | None


def shipped_context(task: Task, frame_shape: tuple[int, int, int] = FRAME_SHAPE) -> Context:
    """Return the task's initial states as the twin shows them, one frame each.

    Args:
        task: whose initial states.
        frame_shape: (H, W, 3) of the world model; the shipped 128x128 frames are resized to it.

    Raises:
        ValueError: the shipped file has none for this task.
    """
    pngs, ends, agent_pos = _shipped(task.name)
    frames = np.stack([_decoded(pngs[start:end]) for start, end in zip([0, *ends], ends, strict=False)])
    no_actions = np.zeros((len(frames), 0, ACTION_DIM), np.float32)
    return Context(resize_frames(frames, *frame_shape[:2])[:, None], no_actions, agent_pos[:, None])


def write_contexts(path: Path, frames: dict[str, np.ndarray], agent_pos: dict[str, np.ndarray]) -> None:
    """Write the file that `shipped_context` reads.

    Args:
        path: where to.
        frames: task name -> (K, H, W, 3) uint8, one frame for each initial state.
        agent_pos: task name -> (K, 7) float32.
    """
    arrays: dict[str, np.ndarray] = {}
    for task, images in frames.items():
        pngs = [_encoded(image) for image in images]
        arrays[f"{task}.png"] = np.frombuffer(b"".join(pngs), np.uint8)
        arrays[f"{task}.ends"] = np.cumsum([len(png) for png in pngs])
        arrays[f"{task}.agent_pos"] = agent_pos[task].astype(np.float32)
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # ty: ignore[invalid-argument-type]


def episode_context(episode: Episode, num_frames: int, frame_shape: tuple[int, int, int]) -> Context:
    """Take an episode's first frames as the context, resized to the model's size (a 4:3 image is squashed).

    Args:
        episode: of any source.
        num_frames: T >= 1.
        frame_shape: (H, W, 3) of the world model.

    Raises:
        ValueError: fewer frames in the episode than asked for, or several and no actions between them.
    """
    if not 1 <= num_frames <= len(episode.frames):
        raise ValueError(
            f"context_frames must be in 1 .. {len(episode.frames)} for episode {episode.episode_id!r}, got {num_frames}"
        )
    if num_frames > 1 and episode.convention == UNKNOWN_ACTIONS:
        raise ValueError(
            f"context_frames must be 1 for episode {episode.episode_id!r}, whose actions are unknown, got {num_frames}"
        )
    frames = resize_frames(episode.frames[:num_frames], *frame_shape[:2])[None]
    agent_pos = None if episode.agent_pos is None else episode.agent_pos[None, :num_frames]
    return Context(frames, episode.actions[None, : num_frames - 1], agent_pos)


def recorded_context(
    caches: Sequence[ClipCache],
    task: Task,
    count: int,
    seed: int,
    frame_shape: tuple[int, int, int] = FRAME_SHAPE,
    *,
    first: bool = False,
) -> Context:
    """Draw beginnings from anywhere in recorded episodes of a task, before it is solved, one frame each.

    Args:
        caches: of the recordings.
        task: whose instruction the episodes have.
        count: how many are drawn.
        seed: of the draw.
        frame_shape: (H, W, 3) of the world model.
        first: only from their first frames.

    Raises:
        ValueError: there is no such frame, or a pose is not known.
    """
    places = []  # (which cache, row) of every frame that one may begin from
    for which, data in enumerate(caches):
        success = data.columns.get("success", np.zeros(len(data.frames))).astype(bool).ravel()
        for start, length, episode in zip(data.starts, data.lengths, data.episodes, strict=True):
            if episode["instruction"] == task.instruction:
                done = success[start : start + length]
                solved = done.argmax() if done.any() else length - 1
                places += [(which, row) for row in range(start, start + min(solved, 1 if first else length))]
    if not places:
        raise ValueError(f"need recorded episodes of {task.instruction!r}, got none in {len(caches)} data sets")
    rng = np.random.default_rng(seed)
    drawn = [places[k] for k in rng.integers(len(places), size=count)]
    frames = np.stack([np.asarray(caches[which].frames[row]) for which, row in drawn])
    agent_pos = np.stack([caches[which].columns["agent_pos"][row] for which, row in drawn])
    if not np.isfinite(agent_pos).all():
        raise ValueError("beginnings need agent_pos in every frame, got NaN")
    no_actions = np.zeros((count, 0, ACTION_DIM), np.float32)
    return Context(resize_frames(frames, *frame_shape[:2])[:, None], no_actions, agent_pos[:, None].astype(np.float32))


def read_episode(path: str | Path) -> Episode:
    """Read "<data set folder>#<episode number>", of any format `open_dataset` knows; without a number, episode 0.

    Raises:
        ValueError: no such data set or episode, or it is damaged; names the path.
    """
    folder, _, number = str(path).partition("#")
    if number and not number.isdecimal():
        raise ValueError(f"initial_context must be '<data set folder>#<episode number>', got {str(path)!r}")
    episodes = open_dataset(folder)
    if int(number or 0) >= len(episodes):
        raise ValueError(f"{folder} has episodes 0 .. {len(episodes) - 1}, got {number}")
    return episodes[int(number or 0)]


@cache
def _shipped(task: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    try:
        with np.load(CONTEXTS_PATH) as arrays:
            return arrays[f"{task}.png"].tobytes(), arrays[f"{task}.ends"], arrays[f"{task}.agent_pos"]
    except KeyError as error:
        raise ValueError(f"{CONTEXTS_PATH} has no initial frames of task {task!r}; give initial_context") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{CONTEXTS_PATH} is missing or damaged: {error}") from error


def _encoded(image: np.ndarray) -> bytes:
    done, png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done
    return png.tobytes()


def _decoded(png: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{CONTEXTS_PATH} is damaged: an image in it is no PNG")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
