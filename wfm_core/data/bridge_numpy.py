"""Read the processed copies of BridgeData V2: `out.npy` files, each a list of trajectories with their frames.

A trajectory is a dict with `observations` and `next_observations`, T dicts each of `images0` (H, W, 3) and `state`, T
`actions`, and `language`, a list of texts. The frame after the last action is the last next observation.

Published files mix recordings of before and after their latency was mended (see `bridge_raw.py`), in which motion
trails the action by 0 and by 1 step, and do not say which is which. `command_lag` is said of all of them; to make them
alike, take what was reached for the actions: `worldsim-convert relabel=true`, or `Episode.relabelled`.
"""

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.pickles import load_object_array, object_array_shape


class BridgeNumpyReader(EpisodeSequence):
    """The trajectories of all `out.npy` files under a folder, by path. Two files at most are held in memory."""

    convention = "commanded"

    def __init__(
        self, directory: Path | str, *, camera: int = 0, split: str | None = None, command_lag: int = 1
    ) -> None:
        """Count the trajectories, from the headers of the files.

        Args:
            directory: searched with its sub-folders.
            camera: number k of the images `images<k>`.
            split: "train" or "val", the folder in which a file lies; None takes both.
            command_lag: control steps by which motion trails the action; 1 of recordings since 2021-07-23, 0 of those
                before.

        Raises:
            DataError: there are no files, or a damaged one; names it.
        """
        self.directory, self.camera, self.command_lag = Path(directory), camera, command_lag
        self._paths = sorted(self.directory.rglob("out.npy" if split is None else f"{split}/out.npy"))
        if not self._paths:
            raise DataError(f"{self.directory}: no {split or '**'}/out.npy files")
        self._ends = np.cumsum([object_array_shape(path)[0] for path in self._paths]).tolist()
        self._file = lru_cache(maxsize=2)(load_object_array)

    def __len__(self) -> int:
        """Number of trajectories."""
        return self._ends[-1]

    def _read(self, index: int) -> Episode:
        """Read one trajectory.

        Raises:
            DataError: its file is damaged, or it lacks something; names the file and the trajectory.
        """
        place = bisect_right(self._ends, index)
        number, path = index - (self._ends[place - 1] if place else 0), self._paths[place]
        trajectory: Any = self._file(path)[number]
        try:
            observed = [*trajectory["observations"], trajectory["next_observations"][-1]]
            texts = [text for text in trajectory.get("language") or [""] if isinstance(text, str)]
            return Episode(
                frames=np.stack([np.asarray(each[f"images{self.camera}"]) for each in observed]),
                actions=np.asarray(trajectory["actions"], np.float32),
                agent_pos=np.asarray([each["state"] for each in observed], np.float32),
                instruction=texts[0].strip() if texts else "",
                episode_id=f"{path.parent.relative_to(self.directory).as_posix()}-{number:05d}",
                convention=self.convention,
                command_lag=self.command_lag,
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}, trajectory {number}: not readable ({error!r})") from error
