"""Bring kept clips of a video into one form: h264 in mp4, at most so large, the same bytes whenever and wherever."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2

from wfm_core.data.files import DataError
from wfm_core.data.video_stream import Moment, stream_video

SAME_AGAIN = {"rc-lookahead": "0", "mbtree": "0", "b_strategy": "0"}
"""Without what x264 finds out by looking ahead, in which it does not come to the same result each time."""


@dataclass
class TranscodeSettings:
    """The form of a clip.

    Attributes:
        side: pixels of its shorter side, at most; 0 leaves it as it is. Sides are even, the aspect stays.
        fps: frames per second; 0 keeps every frame, at the video's own mean rate.
        crf: quality of x264, lower is better.
        preset: of x264, slower is smaller.
    """

    side: int = 480
    fps: float = 0.0
    crf: int = 20
    preset: str = "veryfast"

    def __post_init__(self) -> None:
        if self.side < 0 or self.fps < 0 or not 0 <= self.crf <= 51:
            raise ValueError(f"side and fps must be >= 0 and crf in [0, 51], got {self.side}, {self.fps}, {self.crf}")


@dataclass(frozen=True)
class Span:
    """`num_frames` frames of a video from number `first` on."""

    first: int
    num_frames: int


def output_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of a clip whose shorter side may have `side` pixels."""
    scale = min(1.0, side / min(height, width)) if side else 1.0
    return max(2, 2 * round(scale * height / 2)), max(2, 2 * round(scale * width / 2))


def output_rate(fps: Fraction, settings: TranscodeSettings) -> Fraction:
    """Frames per second of a clip of a video with `fps`."""
    return Fraction(settings.fps).limit_denominator(1001) if settings.fps else fps


def transcode(
    path: Path, spans: Mapping[str, Span], settings: TranscodeSettings
) -> Iterator[tuple[str, bytes | DataError]]:
    """Encode stretches of a video, which is read once and up to the last of them.

    Args:
        path: the video.
        spans: what to encode, by name; they must not overlap.
        settings: how.

    Returns:
        Name and mp4 file of each, in the order of the video; or the error, where a stretch has no such form.

    Raises:
        DataError: the video is damaged, or spans end after it.
        ValueError: spans overlap.
    """
    ordered = sorted(spans.items(), key=lambda item: item[1].first)
    if any(a.first + a.num_frames > b.first for (_, a), (_, b) in zip(ordered[:-1], ordered[1:], strict=True)):
        raise ValueError(f"spans must not overlap, got {dict(ordered)}")
    current: _Encoder | None = None
    for moment in stream_video(path):
        if not ordered:
            return
        name, span = ordered[0]
        if moment.index < span.first:
            continue
        made: bytes | DataError | None = None
        try:
            current = current or _Encoder(moment, settings)
            current.add(moment)
            if moment.index == span.first + span.num_frames - 1:
                made = current.finished()
        except (av.FFmpegError, cv2.error, ValueError, MemoryError) as error:
            made = DataError(f"{path}: cannot encode frame {moment.index}, {moment.width} x {moment.height}: {error}")
        if made is not None:
            yield name, made
            current = None
            ordered.pop(0)
    if ordered:
        raise DataError(f"spans must lie within {path}, got {ordered[0][1]}")


class _Encoder:
    def __init__(self, start: Moment, settings: TranscodeSettings) -> None:
        self._start, self._resampled = start.second, settings.fps > 0
        self._rate = output_rate(start.fps, settings)
        self._size = output_size(start.height, start.width, settings.side)
        self._count = 0
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        stream: Any = self._container.add_stream("libx264", rate=self._rate)
        stream.height, stream.width = self._size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        stream.options = {"crf": str(settings.crf), "preset": settings.preset, **SAME_AGAIN}
        self._stream = stream

    def add(self, moment: Moment) -> None:
        due = self._count + 1
        if self._resampled:  # at every tick the first frame that is not earlier
            due = int((moment.second - self._start) * self._rate + 1e-6) + 1
        if due <= self._count:
            return
        # Converted here: how the encoder's own conversion rounds depends on where its frames lie in memory.
        planes: Any = cv2.cvtColor(moment.picture(*self._size), cv2.COLOR_RGB2YUV_I420)
        picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        for tick in range(self._count, due):
            picture.pts, picture.time_base = tick, 1 / self._rate
            self._container.mux(self._stream.encode(picture))
        self._count = due

    def finished(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()
