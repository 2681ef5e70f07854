"""Video in and out through PyAV: encode, decode, and join without re-encoding.

`lossless` is h264 on RGB planes: frames read back bit for bit, about 6 kB per rendered 128x128 frame. `compact` is the
ordinary yuv420p that every player and browser shows; its halved colour resolution alone limits such small frames to
about 35 dB, which is why recording does not default to it.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from wfm_core.data.files import DataError


@dataclass(frozen=True)
class VideoEncoding:
    """How frames are encoded: PyAV codec name, pixel format and codec options."""

    codec: str
    pix_fmt: str
    options: tuple[tuple[str, str], ...]


# No B-frames: decode order is display order, so that videos join packet by packet. Key frames every 10 frames bound
# what a random access decodes; sc_threshold 0 keeps them there.
_COMMON = (("g", "10"), ("bf", "0"), ("sc_threshold", "0"))

ENCODINGS: dict[str, VideoEncoding] = {
    "lossless": VideoEncoding("libx264rgb", "rgb24", (("qp", "0"), ("preset", "ultrafast"), *_COMMON)),
    "compact": VideoEncoding("libx264", "yuv420p", (("crf", "16"), ("preset", "superfast"), *_COMMON)),
}


LARGEST = 4 << 30
"""Bytes of decoded frames beyond which a video is refused: a small file may hold more than any memory."""


def encode_video(frames: np.ndarray, fps: float, encoding: VideoEncoding = ENCODINGS["lossless"]) -> bytes:
    """Encode frames to one mp4 file.

    Args:
        frames: (T, H, W, 3) uint8, T >= 1; H and W even for `compact`.
        fps: frames per second.
        encoding: codec, pixel format and options.

    Returns:
        The file's bytes.

    Raises:
        ValueError: frames have another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 (T >= 1, H, W, 3), got {frames.dtype} {frames.shape}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(encoding.codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = encoding.pix_fmt
        stream.thread_count = 1
        stream.options = dict(encoding.options)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode_video(path: Path, start_s: float = 0.0, num_frames: int | None = None) -> np.ndarray:
    """Decode frames of a video in display order.

    Args:
        path: the video file.
        start_s: time of the first wanted frame, seconds.
        num_frames: number of wanted frames, or None for all up to the end.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        DataError: the file is missing, unreadable, or lacks a wanted frame, or its frames would take more than
            `LARGEST`; names the file and the frame.
    """
    if not path.is_file():
        raise DataError(f"{path}: the video is missing")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1
            time_base = stream.time_base or Fraction(1, 90_000)
            period = 1 / (stream.average_rate or Fraction(30))
            _check_size(path, min(stream.frames, num_frames or stream.frames), stream.width, stream.height)
            if start_s > 0:
                container.seek(round(start_s / time_base), stream=stream, backward=True, any_frame=False)
            for frame in container.decode(stream):
                if frame.pts is not None:
                    position = (frame.pts * time_base - Fraction(start_s)) / period
                    if position < Fraction(-1, 2):
                        continue  # decoded only because the seek lands on the key frame before
                    if num_frames is not None and abs(position - len(frames)) > Fraction(1, 2):
                        raise DataError(f"{path}: frame {len(frames)} after {start_s:g} s is missing")
                _check_size(path, len(frames) + 1, frame.width, frame.height)
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == num_frames:
                    break
    except av.FFmpegError as error:
        raise DataError(f"{path}: cannot decode frame {len(frames)} after {start_s:g} s: {error}") from error
    if not frames or (num_frames is not None and len(frames) < num_frames):
        wanted = f" of {num_frames}" if num_frames is not None else ""
        raise DataError(f"{path}: the video ends before frame {len(frames)}{wanted} after {start_s:g} s")
    return np.stack(frames)


def _check_size(path: Path, num_frames: int, width: int, height: int) -> None:
    """Refuse what is too large, by what its header says before a frame is decoded, and by what comes out."""
    if num_frames * 3 * width * height > LARGEST:
        raise DataError(
            f"{path}: more than {LARGEST / 2**30:g} GiB are needed for {num_frames} frames, {width} x {height} each; "
            "cut it into shorter videos"
        )


def resize_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize frames (T, H, W, 3) uint8 to (T, height, width, 3), whatever that does to their aspect ratio."""
    if frames.shape[1:3] == (height, width):
        return frames
    # Averaging over areas when shrinking keeps fine textures from aliasing; it does not interpolate when enlarging.
    shrinks = frames.shape[1] * frames.shape[2] > height * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (width, height), interpolation=method) for frame in frames])


def count_frames(path: Path) -> int:
    """Count a video's frames without decoding them.

    Raises:
        DataError: the file is missing or unreadable.
    """
    if not path.is_file():
        raise DataError(f"{path}: the video is missing")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            num_frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: not a readable video: {error}") from error
    return num_frames


def join_videos(parts: Iterable[tuple[Path, int]], fps: float) -> bytes:
    """Join videos of one encoding end to end by copying their packets.

    Args:
        parts: (file, number of frames expected in it), in order, at least one.
        fps: frames per second of all of them.

    Returns:
        One mp4 file's bytes; part k starts where part k - 1 ended.

    Raises:
        DataError: a part is missing, unreadable, of another encoding or length; names the file.
    """
    buffer = io.BytesIO()
    total = 0
    header: bytes | None = None
    target: Any = None
    with av.open(buffer, "w", format="mp4") as output:
        for path, num_frames in parts:
            try:
                with av.open(str(path)) as source:
                    stream: Any = source.streams.video[0]
                    if target is None:
                        header = stream.codec_context.extradata
                        target = output.add_stream_from_template(stream, opaque=True)
                        target.time_base = stream.time_base
                    if stream.codec_context.extradata != header:
                        raise DataError(f"{path}: encoded with other settings than the videos before it")
                    copied = 0
                    for packet in source.demux(stream):
                        if packet.size == 0:
                            continue
                        packet.pts = packet.dts = round((total + copied) / (fps * packet.time_base))
                        packet.stream = target
                        output.mux(packet)
                        copied += 1
            except (av.FFmpegError, IndexError) as error:
                raise DataError(f"{path}: not a readable video: {error}") from error
            if copied != num_frames:
                raise DataError(f"{path}: holds {copied} frames, {num_frames} were recorded")
            total += num_frames
    return buffer.getvalue()
