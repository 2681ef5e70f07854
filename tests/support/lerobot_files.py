"""Small LeRobot data sets of the layouts that are read and not written here: v2, and odd copies of v3."""

import json

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wfm_core.data.episode import Episode
from wfm_core.data.video import VideoEncoding, encode_video

AV1 = {
    "libsvtav1": (("crf", "18"), ("preset", "10"), ("g", "5")),
    "libaom-av1": (("crf", "10"), ("cpu-used", "8"), ("g", "5")),
}
"""Encoders of the codec that LeRobot takes by default -> options."""


def grey_frames(count: int, first: int = 0) -> np.ndarray:
    """Frames (count, 64, 64, 3) of one grey each, which tells their places; lossy codecs keep it."""
    return np.broadcast_to(20 + 9 * (first + np.arange(count))[:, None, None, None], (count, 64, 64, 3)).astype(
        np.uint8
    )


def encode_av1(frames: np.ndarray, encoder: str) -> bytes:
    """Encode frames as LeRobot does, or skip the test where PyAV comes without this encoder."""
    try:
        av.Codec(encoder, "w")
    except ValueError:
        pytest.skip(f"PyAV has no {encoder}")
    return encode_video(frames, 5, VideoEncoding(encoder, "yuv420p", AV1[encoder]))


CAMERAS = ("observation.images.image_0", "observation.images.image_1")
LENGTHS = {0: 5, 1: 7, 2003: 4}  # of which the last lies in another chunk


def frames_of(number: int, camera: int) -> np.ndarray:
    return np.random.default_rng([number, camera]).integers(0, 256, (LENGTHS[number], 16, 24, 3), dtype=np.uint8)


def rows_of(number: int) -> dict[str, np.ndarray]:
    rng, length = np.random.default_rng(number), LENGTHS[number]
    state = rng.normal(size=(length, 8)).astype(np.float32)
    return {"action": rng.normal(size=(length, 7)).astype(np.float32), "observation.state": state}


def table_of(number: int, rename: dict[str, str]) -> dict:
    length = LENGTHS[number]
    columns = {rename.get(name, name): list(value) for name, value in rows_of(number).items()}
    return columns | {
        "next.reward": np.arange(length, dtype=np.float32),
        "timestamp": np.arange(length, dtype=np.float32) / 5,
        "frame_index": np.arange(length),
        "episode_index": np.full(length, number),
        "index": np.arange(length),
        "task_index": np.full(length, number % 2),
    }


def write_v2(root, rename: dict[str, str] | None = None, images: bool = False):
    rename = rename or {}
    features: dict = {name: {"dtype": "image" if images else "video", "shape": [16, 24, 3]} for name in CAMERAS}
    features |= {rename.get("observation.state", "observation.state"): {"dtype": "float32", "shape": [8]}}
    features |= {rename.get("action", "action"): {"dtype": "float32", "shape": [7]}}
    features |= {"next.reward": {"dtype": "float32", "shape": [1]}}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1]}
    (root / "meta").mkdir(parents=True)
    info = {
        "codebase_version": "v2.1",
        "robot_type": "widowx",
        "fps": 5,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    episodes = [{"episode_index": k, "tasks": ["put it | place it"][:k], "length": n} for k, n in LENGTHS.items()]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, reversed(episodes))) + "\n\n")
    tasks = [{"task_index": 0, "task": "open it"}, {"task_index": 1, "task": ""}]
    (root / "meta" / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    for number in LENGTHS:
        table = table_of(number, rename)
        for camera, name in enumerate(CAMERAS):
            frames = frames_of(number, camera)
            if images:
                pngs = [cv2.imencode(".png", frame[..., ::-1])[1].tobytes() for frame in frames]
                table[name] = [{"bytes": png, "path": None} for png in pngs]
            else:
                path = root / f"videos/chunk-{number // 1000:03d}/{name}/episode_{number:06d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_video(frames, 5))
        path = root / f"data/chunk-{number // 1000:03d}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    return root


def make_episode(index: int, steps: int = 6, size: int = 32) -> Episode:
    rng = np.random.default_rng(index)
    return Episode(
        frames=rng.integers(0, 256, (steps + 1, size, size, 3), dtype=np.uint8),
        actions=rng.uniform(0, 0.05, (steps, 7)).astype(np.float32),
        agent_pos=rng.normal(size=(steps + 1, 7)).astype(np.float32),
        instruction=f"task {index % 2}",
        episode_id=f"episode {index}",
        convention="commanded",
        command_lag=0,
        labels={
            "reward.reach": rng.random(steps + 1).astype(np.float32),
            "success": rng.random(steps + 1) > 0.5,
            "source_pos": rng.normal(size=(steps + 1, 3)).astype(np.float32),
        },
        meta={"seed": index, "policy": "expert", "noise": 0.25, "random_layout": index == 1},
    )


def write_nonstandard(root, *, state_dim: int, videos: list[list[int]], keys: str = "primary") -> list[Episode]:
    """A copy as in circulation: foreign templates, no stats, episodes of tasks and length only, padded last actions."""
    episodes = [make_episode(k, steps=4 + k) for k in range(4)]
    lengths = [len(episode.frames) for episode in episodes]
    camera = f"observation.images.{keys}"
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": "v3.0",
        "fps": 5,
        "data_path": "data/chunk-{episode_chunk:03d}/file-{episode_file:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{episode_chunk:03d}/file-{episode_file:03d}.mp4",
        "features": {
            "observation.images.wrist": {"dtype": "video", "shape": [32, 32, 3]},
            camera: {"dtype": "video", "shape": [32, 32, 3]},
            "observation.state": {"dtype": "float32", "shape": [state_dim]},
            "action": {"dtype": "float32", "shape": [7]},
        },
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    ends = np.cumsum(lengths)
    table = {"episode_index": range(4), "tasks": [[f"a | b {k}"] for k in range(4)], "length": lengths}
    table |= {"dataset_from_index": (ends - lengths).tolist(), "dataset_to_index": ends.tolist()}
    pq.write_table(pa.table(table), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    rows = []
    for k, episode in enumerate(episodes):
        state = np.insert(episode.agent_pos, 6, 0, axis=1) if state_dim == 8 else episode.agent_pos
        pad = np.array([[0, 0, 0, 0, 0, 0, 1]], np.float32)
        for t, (s, a) in enumerate(zip(state, np.concatenate([episode.actions, pad]), strict=True)):
            rows.append({"episode_index": k, "frame_index": t, "observation.state": s.tolist(), "action": a.tolist()})
    (root / "data" / "chunk-000").mkdir(parents=True)
    kinds = {"observation.state": pa.list_(pa.float32()), "action": pa.list_(pa.float32())}
    schema = pa.schema({"episode_index": pa.int64(), "frame_index": pa.int64(), **kinds})
    for number, group in enumerate(([0, 1, 2], [3])):
        part = [row for row in rows if row["episode_index"] in group]
        pq.write_table(pa.Table.from_pylist(part, schema), root / "data" / "chunk-000" / f"file-00{number}.parquet")
    folder = root / "videos" / camera / "chunk-000"
    folder.mkdir(parents=True)
    for number, group in enumerate(videos):
        frames = np.concatenate([episodes[k].frames for k in group])
        (folder / f"file-00{number}.mp4").write_bytes(encode_video(frames, 5))
    return episodes
