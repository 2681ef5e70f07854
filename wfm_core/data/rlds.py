"""Read Bridge in RLDS form (TFDS shards, one tf.train.Example an episode) without TensorFlow.

An episode of T steps stores T images and T actions; the image after the last action was dropped when the set was made,
so it yields T - 1 actions. Its `has_image_k` flags are always 0 (a defect of the published builder) and its doc strings
speak of joint angles where end-effector states are: neither is used. A missing camera is stored as black images.

Published files mix recordings of before and after their latency was mended (see `bridge_raw.py`), in which motion
trails the action by 0 and by 1 step, and do not say which is which. `command_lag` is said of all of them; to make them
alike, take what was reached for the actions: `worldsim-convert relabel=true`, or `Episode.relabelled`.
"""

from pathlib import Path

import cv2
import numpy as np

from wfm_core.data.actions import ACTION_DIM, AGENT_POS_DIM
from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.tfrecord import Feature, Records, parse_example, record_files


class RldsReader(EpisodeSequence):
    """The shards of a folder as a sequence of episodes, in file order."""

    def __init__(
        self,
        directory: Path | str,
        *,
        camera: str | None = None,
        split: str | None = None,
        convention: str = "commanded",
        command_lag: int = 1,
    ) -> None:
        """Index the records by reading their headers.

        Args:
            directory: a folder with `<name>-<split>.tfrecord-XXXXX-of-XXXXX` files, there or below.
            camera: name of the image feature; None takes `image_0`, or `image` where there is only that.
            split: "train", "val", ...; None takes all shards.
            convention: action convention of the set.
            command_lag: control steps by which motion trails the action; 1 of recordings since 2021-07-23, 0 of those
                before.

        Raises:
            DataError: no shards, or a damaged one; names the file and the record.
        """
        self.directory = Path(directory)
        self.camera, self.convention, self.command_lag = camera, convention, command_lag
        pattern = "*.tfrecord*" if split is None else f"*-{split}.tfrecord*"
        self._records = Records(record_files(self.directory, pattern))

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._records)

    def _read(self, index: int) -> Episode:
        """Read one episode.

        Raises:
            DataError: the record or an image is damaged, or the camera is missing; names the file and the record.
        """
        path, record = self._records.place(index)
        data = self._records.read(index)
        try:
            return self._episode(parse_example(data), f"{path.name}-{record:05d}")
        except (KeyError, ValueError) as error:
            message = f"feature {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}, record {record}: {message}") from error

    def _episode(self, features: dict[str, Feature], name: str) -> Episode:
        actions = _actions(features)
        frames = _images(features, self.camera)
        if not frames.any():
            raise ValueError("all images are black: the camera was missing in this episode, choose another")
        state = features.get("steps/observation/state")
        texts = features.get("steps/language_instruction") or features.get(
            "steps/observation/natural_language_instruction", [b""]
        )
        meta: dict[str, str | int | float | bool] = {}
        file_path = features.get("episode_metadata/file_path")
        if isinstance(file_path, list) and file_path:
            meta["file_path"] = file_path[0].decode(errors="replace")
        return Episode(
            frames=frames,
            actions=actions[:-1],
            agent_pos=None if state is None else np.asarray(state, np.float32).reshape(-1, AGENT_POS_DIM),
            labels={"reward": np.asarray(features["steps/reward"])} if "steps/reward" in features else {},
            instruction=bytes(texts[0]).decode(errors="replace"),
            episode_id=name,
            convention=self.convention,
            command_lag=self.command_lag,
            meta=meta,
        )


def _actions(features: dict[str, Feature]) -> np.ndarray:
    """Return the (T, 7) actions, stored whole or (in the copy of Open X-Embodiment) in parts."""
    if "steps/action" in features:
        return np.asarray(features["steps/action"], np.float32).reshape(-1, ACTION_DIM)
    moves = np.asarray(features["steps/action/world_vector"], np.float32).reshape(-1, 3)
    turns = np.asarray(features["steps/action/rotation_delta"], np.float32).reshape(-1, 3)
    gripper = np.asarray(features["steps/action/open_gripper"], np.float32).reshape(-1, 1)
    return np.concatenate([moves, turns, gripper], axis=1)


def _images(features: dict[str, Feature], camera: str | None) -> np.ndarray:
    prefix = "steps/observation/"
    cameras = [key.removeprefix(prefix) for key in features if key.startswith(f"{prefix}image")]
    if camera is None:
        camera = "image_0" if "image_0" in cameras else "image"
    if camera not in cameras:
        raise ValueError(f"camera must be one of {sorted(cameras)}, got {camera!r}")
    frames = []
    for number, encoded in enumerate(features[prefix + camera]):
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"frame {number} of {camera} is not a readable image")
        frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    return np.stack(frames)
