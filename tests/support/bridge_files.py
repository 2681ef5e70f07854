"""A small BridgeData V2 as it was recorded, and as it was processed into lists."""

import pickle

import cv2
import numpy as np

from wfm_core.data import actions as A

AFTER, BEFORE = "2022-03-01_10-20-30", "2021-07-22_10-20-30"  # of the day on which the recording was mended
NEW, OLD = f"kitchen/put/{AFTER}/raw/traj_group0/traj0", f"kitchen/take/{BEFORE}/raw/traj_group0/traj3"


def plain_frames(count: int, seed: int = 0) -> np.ndarray:
    """Frames of one colour each, which JPEG keeps."""
    colours = np.random.default_rng(seed).integers(20, 230, (count, 1, 1, 3))
    return np.broadcast_to(colours, (count, 24, 32, 3)).astype(np.uint8)


def some_actions(count: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(A.ACTION_LOW, A.ACTION_HIGH, (count, 7)).astype(np.float32)


def some_poses(count: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(count, 7)).astype(np.float32)


def write_trajectory(folder, steps=5, seed=0, bare=False, protocol=pickle.HIGHEST_PROTOCOL, language=None):
    """A trajectory of the raw layout, of steps + 1 frames."""
    for camera in (0, 1):
        (images := folder / f"images{camera}").mkdir(parents=True)
        for number, frame in enumerate(plain_frames(steps + 1, 10 * seed + camera)):
            cv2.imwrite(str(images / f"im_{number}.jpg"), frame[..., ::-1])
    observed = {
        "full_state": some_poses(steps + 1),
        "time_stamp": [0.0] * (steps + 1),
        "env_done": False,
    }
    (folder / "obs_dict.pkl").write_bytes(pickle.dumps(observed, protocol))
    taken = [action if bare else {"actions": action, "policy_type": "VR"} for action in some_actions(steps)]
    (folder / "policy_out.pkl").write_bytes(pickle.dumps(taken, protocol))
    if language is not None:
        (folder / "lang.txt").write_text(language)


def write_raw(root):
    """Two trajectories, of which one is of before the mending, and a copy of the other to be left out."""
    write_trajectory(root / NEW, language="confidence: 1\n\nput it\nplace it")
    write_trajectory(root / OLD, 12, seed=1, bare=True, protocol=2)
    write_trajectory(root / NEW.replace("put", "lmdb_copy"))
    return root


def processed_trajectory(steps: int, seed: int, language: list[str]) -> dict:
    cameras = {f"images{camera}": plain_frames(steps + 1, 100 * camera + seed) for camera in (0, 1)}
    states = some_poses(steps + 1)
    seen = [
        {name: frames[t] for name, frames in cameras.items()} | {"state": states[t], "time_stamp": 0.0}
        for t in range(steps + 1)
    ]
    return {
        "observations": seen[:-1],
        "next_observations": seen[1:],
        "actions": list(some_actions(steps)),
        "terminals": [0] * steps,
        "language": language,
    }


def write_processed(root):
    """Trajectories of 3, 4 and 5 steps in two files."""
    for split, trajectories in (
        ("train", [processed_trajectory(3, 0, ["fold it ", "fold"]), processed_trajectory(4, 1, [])]),
        ("val", [processed_trajectory(5, 2, [""])]),
    ):
        (folder := root / "icra" / "kitchen" / split).mkdir(parents=True)
        np.save(folder / "out.npy", np.array(trajectories, object), allow_pickle=True)
    return root
