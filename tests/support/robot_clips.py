"""Episodes in which a block goes where a robot is told to, and faults to plant in them."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from wfm_core.data.camera_rays import FOCALS, POSES, pack_pose
from wfm_core.data.episode import Episode
from wfm_core.data.lerobot_v3_writer import assemble_dataset, stage_episode

SIZE = 64


def robot_episode(seed: int, steps: int = 24) -> Episode:
    """A block moves over a textured table by what is commanded, now fast, now slowly; a robot that feels."""
    rng = np.random.default_rng(seed)
    table = cv2.resize(rng.integers(60, 200, (9, 9, 3)).astype(np.uint8), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    table = np.clip(table + rng.integers(-25, 25, table.shape), 0, 255).astype(np.uint8)
    pace = rng.choice([0.0, 0.01, 0.03], steps)[:, None] * rng.choice([-1, 1], (steps, 3))
    actions = np.zeros((steps, 7), np.float32)
    actions[:, :3], actions[:, 6] = pace, rng.random(steps) < 0.5
    places = np.concatenate([[[0.0, 0.0, 0.0]], np.cumsum(actions[:, :3], axis=0)])
    frames = []
    for x, y, _ in (SIZE / 2 + 100 * places).astype(int):
        frame = np.roll(table, 0)
        columns, rows = (np.arange(x, x + 18) % SIZE, np.arange(y, y + 18) % SIZE)
        frame[np.ix_(rows, columns)] = (220, 40, 40)
        frames.append(frame)
    poses = np.concatenate([places, np.zeros((steps + 1, 3)), np.ones((steps + 1, 1))], axis=1).astype(np.float32)
    return Episode(np.stack(frames), actions, poses, f"task {seed % 3}", f"episode {seed}", "commanded", 0)


def filmed_episode(seed: int) -> Episode:
    """An episode at 32 pixels, filmed by a moving camera and by one more, which sees its picture mirrored."""
    episode, rng = robot_episode(seed, 10).resized(32, 32), np.random.default_rng(seed)
    poses = pack_pose(np.tile(np.eye(3), (11, 1, 1)), np.cumsum(rng.normal(size=(11, 3)), axis=0))
    labels = {POSES: poses, FOCALS: np.ones((11, 2), np.float32)}
    return replace(episode, labels=labels, views={"wrist": episode.frames[:, :, ::-1].copy()})


def write_dataset(folder: Path, episodes: list[Episode]) -> str:
    """As a LeRobot data set."""
    for k, episode in enumerate(episodes):
        stage_episode(folder / ".staging", k, episode)
    assemble_dataset(folder / ".staging", folder)
    return str(folder)


def with_frames(episode: Episode, frames: np.ndarray) -> Episode:
    return replace(episode, frames=frames.astype(np.uint8))


def shuffled(episode: Episode, seed: int = 0) -> Episode:
    """Its actions in another order."""
    return replace(episode, actions=np.random.default_rng(seed).permutation(episode.actions))


def frozen(episode: Episode) -> Episode:
    """Its camera has stopped after the first frames."""
    frames = episode.frames.copy()
    frames[6:] = frames[6]
    return replace(episode, frames=frames)


def teleported(episode: Episode) -> Episode:
    """Its states jump by a decimetre and a half once."""
    poses = episode.agent_pos.copy()
    poses[10:, 0] += 0.15
    return replace(episode, agent_pos=poses)
