"""Small data sets of TFRecords: RLDS, and BridgeData V2 as processed into serialised tensors."""

from pathlib import Path

import cv2
import numpy as np
from clip_files import smooth_frames, some_actions, some_poses

from wfm_core.data.tfrecord import write_records


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(value) -> bytes:
    if isinstance(value, list):
        return field(1, b"".join(field(1, item) for item in value))
    if value.dtype == np.float32:
        return field(2, field(1, value.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(number)) for number in value)))


def example(features: dict) -> bytes:
    entries = (field(1, field(1, name.encode()) + field(2, feature(value))) for name, value in features.items())
    return field(1, b"".join(entries))


def jpegs(frames: np.ndarray) -> list[bytes]:
    return [cv2.imencode(".jpg", f[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes() for f in frames]


def rlds_features(count: int, seed: int) -> dict:
    return {
        "steps/action": some_actions(count).reshape(-1),
        "steps/observation/state": some_poses(count).reshape(-1),
        "steps/observation/image_0": jpegs(smooth_frames(count, seed)),
        "steps/observation/image_3": jpegs(np.zeros((count, 32, 32, 3), np.uint8)),
        "steps/language_instruction": [f"do {seed}".encode()] * count,
        "steps/reward": np.arange(count, dtype=np.float32),
        "steps/is_first": np.array([1] + [0] * (count - 1)),
        "steps/is_last": np.zeros(count, np.int64),  # as in sets that were cut short
        "steps/is_terminal": np.zeros(count, np.int64),
        "episode_metadata/has_image_0": np.array([0]),
        "episode_metadata/file_path": [b"/somewhere/out.npy"],
    }


def tensor(value) -> list[bytes]:
    """A feature that holds a serialised tensor: its type, its shape, and its content or its texts."""
    if isinstance(value, list):
        kind, shape, content = 7, [len(value)], b"".join(field(8, text.encode()) for text in value)
    else:
        kind = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "bool": 10, "int64": 9}[value.dtype.name]
        shape, content = value.shape, field(4, value.tobytes())
    sizes = b"".join(field(2, varint(1 << 3) + varint(size)) for size in shape)
    return [varint(1 << 3) + varint(kind) + field(2, sizes) + content]


def tensor_features(steps: int, seed: int, language: list[str]) -> dict:
    """A processed trajectory, of one frame more than steps."""
    features: dict = {"language": tensor(language), "actions": tensor(some_actions(steps))}
    features |= {name: tensor(np.zeros(steps, bool)) for name in ("terminals", "truncates")}
    seen = {"images0": smooth_frames(steps + 1, seed), "images1": smooth_frames(steps + 1, 100 + seed)}
    for name, values in (seen | {"state": some_poses(steps + 1)}).items():
        features |= {f"observations/{name}": tensor(values[:-1]), f"next_observations/{name}": tensor(values[1:])}
    return features


def write_tensors(root: Path) -> Path:
    """Trajectories of 3, 4 and 5 steps in two files."""
    trajectories = [tensor_features(3, 0, ["fold it ", "fold"]), tensor_features(4, 1, []), tensor_features(5, 2, [""])]
    for split, part in (("train", trajectories[:2]), ("val", trajectories[2:])):
        (folder := root / "icra" / "kitchen" / split).mkdir(parents=True)
        write_records(folder / "out.tfrecord", [example(features) for features in part])
    return root


def write_rlds(folder: Path) -> Path:
    """Three episodes of 5, 6 and 7 steps in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, seeds in enumerate(([0, 1], [2])):
        records = [example(rlds_features(5 + seed, seed)) for seed in seeds]
        write_records(folder / f"bridge-train.tfrecord-0000{shard}-of-00002", records)
    return folder
