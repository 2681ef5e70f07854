"""Small data sets of the layouts that are videos with a table: clip pairs, and the JSON of IRASim."""

import json
from pathlib import Path

import cv2
import numpy as np

from wfm_core.data import actions as A
from wfm_core.data.video import encode_video


def smooth_frames(count: int, seed: int = 0, size: int = 32) -> np.ndarray:
    """Frames that JPEG and video keep well."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 220, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_CUBIC) for frame in coarse])


def some_actions(count: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(A.ACTION_LOW * 0.9, A.ACTION_HIGH * 0.9, (count, 7)).astype(np.float32)


def some_poses(count: int) -> np.ndarray:
    start = np.array([0.3, 0, 0.1, 0.05, -0.03, 0.4, 1.0], np.float32)
    return A.integrate(start, some_actions(count - 1))


def write_pairs(folder: Path) -> Path:
    """Two pairs, of 6 and 7 frames."""
    (folder / "train").mkdir(parents=True)
    for k in range(2):
        scaled = np.concatenate([A.to_scaled(some_actions(6 + k)), np.zeros((6 + k, 3))], axis=1).astype(np.float32)
        np.savez(folder / "train" / f"{k:09d}.npz", scaled)
        (folder / "train" / f"{k:09d}.mp4").write_bytes(encode_video(smooth_frames(6 + k, k), fps=20))
    return folder


def write_irasim(root: Path) -> tuple[np.ndarray, dict]:
    """An episode of 7 frames that two cameras saw; returns its poses (7, 7) and its annotation, `12.json`."""
    poses = some_poses(7)
    states, closedness = A.to_irasim_state(poses)
    (root / "annotation" / "train").mkdir(parents=True)
    (root / "videos" / "train" / "12").mkdir(parents=True)
    videos = ["videos/train/12/rgb.mp4", "videos/train/12/wrist.mp4"]
    for camera, video in enumerate(videos):
        (root / video).write_bytes(encode_video(smooth_frames(7, camera), fps=4))
    openness = (poses[:, 6:] > 0.5).astype(float)
    relative = A.to_gripper_frame(A.relabel(poses), poses)
    note = {
        "texts": ["put the pot on the stove"],
        "videos": [{"video_path": video} for video in videos],
        "state": np.concatenate([states, openness], axis=1).tolist(),
        "continuous_gripper_state": closedness.tolist(),
        "action": np.concatenate([relative[:, :6], openness[1:]], axis=1).tolist(),  # binary, and 1 = open
    }
    (root / "annotation" / "train" / "12.json").write_text(json.dumps(note))
    return poses, note
