"""Split a video into clips that hold one shot each and are not too long, in one pass and in constant memory."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from wfm_core.curation.measures import MEASURED
from wfm_core.data.video_stream import Moment

LAG = 2
"""Frames on either side of a cut that the detector compares it with; it knows of a cut that much later."""
TEXT_LINES, TEXT_FPS = 480, 1.0
"""Height of the pictures in which text is looked for, and how many of them there are in a second."""


@dataclass
class SplitSettings:
    """Where clips begin and end.

    Attributes:
        longest: seconds of a clip; what remains of a shot is a clip of its own.
        shot_ratio: how many times as much as between its neighbours must change between two frames for a cut.
        shot_change: mean change of hue, saturation and value, of 255, that there must be at least; inf never cuts.
        fps: frames per second at which clips are measured, about: every n-th frame is.
    """

    longest: float = 10.0
    shot_ratio: float = 4.0
    shot_change: float = 8.0
    fps: float = 8.0

    def __post_init__(self) -> None:
        for name in ("longest", "shot_ratio", "fps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Clip:
    """What is kept of a stretch of a video to measure it by.

    Attributes:
        first: number of its first frame in the video.
        num_frames: that it has in the video.
        start_s: seconds, of its first frame.
        end_s: seconds, of the first frame after it.
        fps: of the video.
        height: pixels, of the video as it is to be shown.
        width: likewise.
        frames: (T, *MEASURED, 3) uint8, about `SplitSettings.fps` a second.
        large: (N, TEXT_LINES, width, 3) uint8, about `TEXT_FPS` a second.
    """

    first: int
    num_frames: int
    start_s: float
    end_s: float
    fps: Fraction
    height: int
    width: int
    frames: np.ndarray
    large: np.ndarray


@dataclass(frozen=True)
class _Look:
    moment: Moment
    small: np.ndarray


def measured_stride(fps: Fraction, settings: SplitSettings) -> int:
    """Frames of a video from one that is measured to the next; steps of one length, or a pan would seem to shake."""
    return max(1, round(float(fps) / settings.fps))


class ShotDetector:
    """Tells cuts in a stream of frames, `LAG` frames late; a change that goes on, as of a camera that pans, is none."""

    def __init__(self, settings: SplitSettings) -> None:
        """Raises ImportError without the library, saying how to install it."""
        try:
            from scenedetect import AdaptiveDetector, FrameTimecode
        except ImportError as error:
            raise ImportError(
                "splitting videos into shots needs scenedetect-headless: pip install 'worldsim[curate]'"
            ) from error
        self._time: Any = FrameTimecode
        self._detector = AdaptiveDetector(
            settings.shot_ratio, min_scene_len=1, window_width=LAG, min_content_val=settings.shot_change
        )
        self._next = 0

    def push(self, frame: np.ndarray) -> int | None:
        """Take the next frame, (H, W, 3) uint8; says which frame is a shot's first one, if that is known now."""
        cuts = self._detector.process_frame(self._time(self._next, fps=1.0), frame[..., ::-1])
        self._next += 1
        return cuts[0].frame_num if cuts else None


def split_video(moments: Iterable[Moment], settings: SplitSettings) -> Iterator[Clip]:
    """Cut a video where shots end and where clips would become too long.

    Args:
        moments: of `stream_video`.
        settings: where to cut.

    Returns:
        Clips one after the other, without gaps, whatever their length; at most one is in memory, at small sizes.
    """
    detector = ShotDetector(settings)
    waiting: deque[_Look] = deque()
    cuts: set[int] = set()
    clip: _Growing | None = None

    def settle(look: _Look) -> Iterator[Clip]:
        nonlocal clip
        moment = look.moment
        if clip and (moment.index in cuts or clip.is_full(moment)):
            yield clip.finished(moment.second)
            clip = None
        cuts.discard(moment.index)
        clip = clip or _Growing(moment, settings)
        clip.add(look)

    for moment in moments:
        waiting.append(_Look(moment, moment.picture(*MEASURED)))
        cut = detector.push(waiting[-1].small)
        if cut is not None:
            cuts.add(cut)
        if len(waiting) > LAG:
            yield from settle(waiting.popleft())
    while waiting:
        yield from settle(waiting.popleft())
    if clip:
        yield clip.finished(clip.last.second + float(1 / clip.last.fps))


class _Growing:
    """A clip whose end is not yet known."""

    def __init__(self, start: Moment, settings: SplitSettings) -> None:
        self.start = self.last = start
        self._longest = settings.longest
        self._stride = measured_stride(start.fps, settings)
        self._most = math.ceil(2 * settings.longest * settings.fps)
        self._small: list[np.ndarray] = []
        self._large: list[np.ndarray] = []

    def add(self, look: _Look) -> None:
        self.last = look.moment
        since = look.moment.second - self.start.second
        if (look.moment.index - self.start.index) % self._stride == 0:
            self._small.append(look.small)
        if since * TEXT_FPS >= len(self._large) - 1e-6:
            width = min(4 * TEXT_LINES, max(1, round(look.moment.width * TEXT_LINES / look.moment.height)))
            self._large.append(look.moment.picture(TEXT_LINES, width))

    def is_full(self, moment: Moment) -> bool:
        """Whether it would be too long with this one; by its frames, too, since times may be wrong."""
        return moment.second - self.start.second >= self._longest - 1e-6 or len(self._small) >= self._most

    def finished(self, end_s: float) -> Clip:
        start = self.start
        frames, large = np.stack(self._small), np.stack(self._large)
        count = self.last.index + 1 - start.index
        return Clip(start.index, count, start.second, end_s, start.fps, start.height, start.width, frames, large)
