"""Read a folder of plain videos: frames without actions, which is enough to train a tokenizer.

The frame rate is whatever the files have. Frames become squares: the shorter side is kept whole and the longer one
cropped in the middle, so that the aspect ratio stays, then the square is resized.
"""

from pathlib import Path

import numpy as np

from wfm_core.data.actions import ACTION_DIM
from wfm_core.data.episode import UNKNOWN_ACTIONS, Episode, EpisodeSequence
from wfm_core.data.files import DataError
from wfm_core.data.video import decode_video, resize_frames

SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
CONTAINERS = (*SUFFIXES, ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".flv", ".wmv", ".3gp", ".gif")
"""What is looked for where every video is to be found, in upper or lower case."""
TABLES = (".json", ".jsonl", ".npz", ".parquet")


class VideoFolderReader(EpisodeSequence):
    """All videos under a folder, by path; each is an episode whose actions are unknown."""

    convention = UNKNOWN_ACTIONS
    command_lag = 0

    def __init__(self, directory: Path | str, *, size: int = 128) -> None:
        """List the videos.

        Args:
            directory: searched with its sub-folders for files with one of `SUFFIXES`.
            size: height and width of the frames, pixels.

        Raises:
            DataError: there are no videos, or there are tables beside them, as in an incomplete set of another format.
            ValueError: size is not positive.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.directory, self.size = Path(directory), size
        self._paths = sorted(path for path in self.directory.rglob("*") if path.suffix in SUFFIXES)
        if not self._paths:
            raise DataError(f"{self.directory}: no videos ({', '.join(SUFFIXES)})")
        if table := next((path for path in sorted(self.directory.rglob("*")) if path.suffix in TABLES), None):
            raise DataError(
                f"{table}: plain videos have no tables beside them; is this a damaged set of another format?"
            )

    def __len__(self) -> int:
        """Number of videos."""
        return len(self._paths)

    def _read(self, index: int) -> Episode:
        """Read one video.

        Raises:
            DataError: the file is damaged; names it and the frame.
        """
        path = self._paths[index]
        frames = square_frames(decode_video(path), self.size)
        return Episode(
            frames=frames,
            actions=np.full((len(frames) - 1, ACTION_DIM), np.nan, dtype=np.float32),
            agent_pos=None,
            instruction="",
            episode_id=path.relative_to(self.directory).as_posix(),
            convention=self.convention,
            command_lag=self.command_lag,
        )


def video_files(place: Path) -> list[Path]:
    """All videos under a folder, or the one that `place` is, by path.

    Raises:
        DataError: there are none.
    """
    found = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix.lower() in CONTAINERS)
    if not found:
        raise DataError(f"{place}: no videos ({', '.join(CONTAINERS)})")
    return found


def square_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """Crop frames (T, H, W, 3) uint8 to the square in their middle and resize it to (T, size, size, 3)."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_frames(frames[:, top : top + side, left : left + side], size, size)
