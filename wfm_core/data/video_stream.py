"""Go through a video frame by frame in constant memory, however long or malicious it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from wfm_core.data.files import DataError

LARGEST_FRAME = 1 << 26
"""Pixels of a frame, 8192 x 8192, beyond which the decoder refuses it before it takes memory."""
LARGEST_VIDEO = 6e12
"""Pixels of a whole video, a day of 1080p at 30 frames per second, beyond which it is refused: a small file may claim
or hold more than anyone could decode."""
LOST = 0.02
"""Share of the declared frames that may be absent: containers count frames that edits hide."""
USUAL_FPS = Fraction(30)
AREA, BICUBIC = 0x20, 0x4
EXACT = 0x40000 | 0x80000
"""Of swscale: round accurately and exactly, so that a picture does not depend on where it lies in memory."""


@dataclass(frozen=True)
class Moment:
    """A decoded frame.

    Attributes:
        index: its number, from 0.
        second: its time after the first one; it rises.
        fps: frames per second of the video, on average.
        height: pixels, as it is to be shown: upright, with square pixels.
        width: likewise.
        frame: as it was decoded.
    """

    index: int
    second: float
    fps: Fraction
    height: int
    width: int
    frame: av.VideoFrame

    def picture(self, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8, upright."""
        quarters = self.frame.rotation // 90 % 4
        size = {"height": height, "width": width} if quarters % 2 == 0 else {"height": width, "width": height}
        shrinks = height * width < self.height * self.width
        small = self.frame.reformat(**size, format="rgb24", interpolation=EXACT | (AREA if shrinks else BICUBIC))
        return np.ascontiguousarray(np.rot90(small.to_ndarray(), quarters))


def stream_video(path: Path) -> Iterator[Moment]:
    """Decode a video's frames in the order in which they are shown.

    Raises:
        DataError: the file is missing, unreadable, damaged, ends too early, or claims or holds more pixels than
            `LARGEST_FRAME` in a frame or `LARGEST_VIDEO` in all; names the file and the frame.
    """
    if not path.is_file():
        raise DataError(f"{path}: the video is missing")
    index = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: holds no video stream")
            stream: Any = container.streams.video[0]
            stream.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(LARGEST_FRAME)}
            _check_size(path, stream.width * stream.height, stream.frames)
            fps = stream.average_rate or USUAL_FPS
            pixel = stream.sample_aspect_ratio or 1
            first, second, pixels = None, 0.0, 0
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise DataError(f"{path}: frame {index} is damaged")
                pixels += frame.width * frame.height
                _check_size(path, pixels, 1)
                if frame.pts is not None:
                    first = frame.pts if first is None else first
                    shown = float((frame.pts - first) * frame.time_base)
                # Times that are absent or go back are made up.
                rises = frame.pts is not None and (index == 0 or shown > second)
                second = shown if rises else second + float(index > 0) / float(fps)
                height, width = frame.height, round(frame.width * pixel)
                if frame.rotation // 90 % 2:
                    height, width = width, height
                yield Moment(index, second, fps, height, width, frame)
                index += 1
            if index < (1 - LOST) * stream.frames - 1 or index == 0:
                raise DataError(f"{path}: ends before frame {index} of {stream.frames or 'at least one'}")
    except av.FFmpegError as error:
        raise DataError(f"{path}: cannot decode frame {index}: {error}") from error


def picture_at(path: Path, second: float, height: int, width: int) -> np.ndarray:
    """Picture (height, width, 3) uint8 of a readable video at a time; it jumps there where the container lets it.

    Raises:
        DataError: there is none, as where times start anew in the middle; names the file.
    """
    frame = None
    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            stream.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(LARGEST_FRAME)}
            start = float((stream.start_time or 0) * stream.time_base)
            if second > 0:
                container.seek(round((start + second) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None or float(frame.pts * frame.time_base) - start >= second:
                    break
    except av.FFmpegError as error:
        raise DataError(f"{path}: cannot show what is there at {second:g} s: {error}") from error
    if frame is None:
        raise DataError(f"{path}: shows nothing after {second:g} s")
    return Moment(0, second, USUAL_FPS, frame.height, frame.width, frame).picture(height, width)


def _check_size(path: Path, pixels: int, count: int) -> None:
    if pixels * max(count, 1) > LARGEST_VIDEO:
        raise DataError(f"{path}: more than {LARGEST_VIDEO:g} pixels in all; cut it into shorter videos")
