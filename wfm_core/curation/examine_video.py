"""Examine one video: split it into clips, and measure, tag, fingerprint and embed each, whatever is wrong with it."""

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wfm_core.curation.camera_motion import CameraLimits, camera_motion, camera_tags
from wfm_core.curation.duplicates import fingerprint
from wfm_core.curation.measures import MEASURED, measure_frames
from wfm_core.curation.split import Clip, SplitSettings, measured_stride, split_video
from wfm_core.curation.text_overlay import count_letters
from wfm_core.data.video_stream import stream_video

if TYPE_CHECKING:  # episodes are curated by the same command, without torch
    from torch import nn

EMBEDDED = 16
"""Frames of a clip that its embedding is made of."""


@dataclass
class ExamineSettings:
    """What is found out about a video.

    Attributes:
        split: where its clips begin and end.
        camera: from where on its camera's motions have names.
        network: that embeds: "gabor", or the file of one that maps images (N, 3, 96, 128) in [-1, 1] to a list of
            features (N, C, h, w), written by `torch.export.save` for any N.
    """

    split: SplitSettings = field(default_factory=SplitSettings)
    camera: CameraLimits = field(default_factory=CameraLimits)
    network: str = "gabor"


@dataclass(frozen=True)
class ClipFindings:
    """What was found out about a clip.

    Attributes:
        first: number of its first frame in the video.
        num_frames: that it has in the video.
        start_s: seconds, of its first frame.
        end_s: seconds, of the first frame after it.
        fps: of the video, numerator and denominator.
        measures: of `measure_frames` at `SplitSettings.fps`; `num_frames`, `height` and `width` are the video's own;
            `seconds`; those of `camera_motion`; and `letters`, of `count_letters`.
        tags: of `camera_tags`.
        fingerprint: hexadecimal, see `duplicates.py`.
        embedding: of `clip_embedding`.
    """

    first: int
    num_frames: int
    start_s: float
    end_s: float
    fps: tuple[int, int]
    measures: dict[str, float]
    tags: list[str]
    fingerprint: str
    embedding: list[float]


@dataclass(frozen=True)
class VideoFindings:
    """What was found out about a video: its clips without gaps, or why it cannot be read."""

    error: str = ""
    clips: list[ClipFindings] = field(default_factory=list)


def examine_video(path: Path, settings: ExamineSettings) -> VideoFindings:
    """Read a video once; what cannot be read to its end is a finding, too.

    Raises:
        ImportError: the shot detector is not installed.
        ValueError: the settings name no network.
        RuntimeError: the network takes no such images.
    """
    network = _network(settings.network)
    try:
        clips = [_examine(clip, settings, network) for clip in split_video(stream_video(path), settings.split)]
    except ImportError:
        raise
    # As in `examine`: whatever a foreign file does to whichever library looks at it is to cost this video alone.
    except Exception as error:  # noqa: BLE001
        return VideoFindings(f"{type(error).__name__}: {error}")
    return VideoFindings(clips=clips)


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Let torch compute by one thread: sums depend on how many share them, and what is found must not."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _examine(clip: Clip, settings: ExamineSettings, network: "nn.Module") -> ClipFindings:
    size = {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width, "fps": clip.fps}
    fps = float(clip.fps) / measured_stride(clip.fps, settings.split)
    motion = camera_motion(clip.frames, clip.width / clip.height, fps)
    letters = {"seconds": clip.end_s - clip.start_s, "letters": count_letters(clip.large)}
    measures = measure_frames(clip.frames) | size | motion | letters
    return ClipFindings(
        first=clip.first,
        num_frames=clip.num_frames,
        start_s=clip.start_s,
        end_s=clip.end_s,
        fps=Fraction(clip.fps).as_integer_ratio(),
        measures={name: float(value) for name, value in measures.items()},
        tags=camera_tags(motion, settings.camera),
        fingerprint=fingerprint(clip.frames).tobytes().hex(),
        embedding=_embed(clip.frames, network),
    )


def _embed(frames: np.ndarray, network: "nn.Module") -> list[float]:
    from wfm_core.tokenizers.perceptual import clip_embedding, frame_features

    chosen = np.linspace(0, len(frames) - 1, min(EMBEDDED, len(frames))).round().astype(int)
    with one_thread():
        embedding = clip_embedding(frame_features(network, frames[chosen]))
    return [float(f"{value:.6g}") for value in embedding]


@lru_cache(maxsize=1)
def _network(spec: str) -> "nn.Module":
    from wfm_core.tokenizers.perceptual import load_feature_network

    network = load_feature_network(spec)
    _embed(np.zeros((1, *MEASURED, 3), np.uint8), network)  # one that does not fit is no video's fault
    return network
