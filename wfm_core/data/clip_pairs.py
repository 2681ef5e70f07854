"""Read pairs of one mp4 and one npz with scaled actions (`wfm_core.data.actions.from_scaled`), no proprioception.

The npz holds `arr_0` (T, >= 7), one row a frame, of which columns past the seventh are padding. The last row has no
frame after it, so T frames yield T - 1 actions. The video's own frame rate is not the control rate and is ignored.
"""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from wfm_core.data.actions import ACTION_DIM, from_scaled
from wfm_core.data.episode import Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.video import decode_video


class ClipPairReader(EpisodeSequence):
    """All pairs under a folder, by path."""

    def __init__(self, directory: Path | str, *, convention: str = "commanded", command_lag: int = 1) -> None:
        """List the pairs.

        Args:
            directory: searched with its sub-folders for *.npz.
            convention: action convention of the set.
            command_lag: control steps by which motion trails the action.

        Raises:
            DataError: there are no npz files.
        """
        self.directory = Path(directory)
        self.convention, self.command_lag = convention, command_lag
        self._paths = sorted(self.directory.rglob("*.npz"))
        if not self._paths:
            raise DataError(f"{self.directory}: no .npz files")

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self._paths)

    def _read(self, index: int) -> Episode:
        """Read one episode.

        Raises:
            DataError: a file is missing or damaged, or the pair's lengths differ; names the file.
        """
        path = self._paths[index]
        try:
            with np.load(path) as arrays:
                rows = arrays["arr_0"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{path}: not a readable npz with arr_0 ({error})") from error
        if rows.ndim != 2 or rows.shape[1] < ACTION_DIM:
            raise DataError(f"{path}: arr_0 must have shape (T, >= {ACTION_DIM}), got {rows.shape}")
        frames = decode_video(path.with_suffix(".mp4"))
        if len(frames) != len(rows):
            raise DataError(f"{path.with_suffix('.mp4')}: has {len(frames)} frames, its actions are {len(rows)}")
        return Episode(
            frames=frames,
            actions=from_scaled(rows[:-1, :ACTION_DIM]),
            agent_pos=None,
            instruction="",
            episode_id=path.relative_to(self.directory).with_suffix("").as_posix(),
            convention=self.convention,
            command_lag=self.command_lag,
        )
