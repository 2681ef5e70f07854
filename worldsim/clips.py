"""Episodes to watch: chosen by what they show, imagined and true side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wfm_core.data.video import VideoEncoding, encode_video
from worldsim.evaluate import EpisodeRecord, Trace
from worldsim.leaderboard import IMAGINED, TWIN
from worldsim.store import EpisodeStore

PLAYBACK_FPS = 10
"""Twice as fast as control runs."""

_ENCODING = VideoEncoding("libx264", "yuv420p", (("crf", "24"), ("preset", "fast"), ("g", "60")))
_GAP, _BAR = 8, 4  # pixels between the worlds, and height of the time bar
_RUNNING, _SOLVED, _FAILED, _GROUND = (168, 168, 176), (58, 160, 110), (206, 84, 76), (38, 39, 44)


@dataclass(frozen=True)
class Clip:
    """An episode of one policy in the worlds it was run in; `true` is None without a twin."""

    imagined: EpisodeRecord
    true: EpisodeRecord | None
    mp4: bytes


CATEGORIES: dict[str, tuple[bool, bool | None]] = {
    "Both succeed": (True, True),
    "Both fail": (False, False),
    "Imagination too kind": (True, False),
    "Imagination too harsh": (False, True),
    "Imagined successes": (True, None),
    "Imagined failures": (False, None),
}
"""Title -> (imagined success, true success); None: there is no twin."""


def choose_clips(records: Sequence[EpisodeRecord], store: EpisodeStore, per_category: int = 4) -> dict[str, list[Clip]]:
    """Choose episodes of every kind whose videos were kept, from as many tasks and policies as can be.

    Args:
        records: the episodes of the ranking.
        store: holds their videos.
        per_category: most clips of one kind.

    Returns:
        Category -> clips; categories without any are left out.

    Raises:
        ValueError: a video is damaged.
    """
    with_twin = any(record.world == TWIN for record in records)
    true = {(r.policy, r.task, *r.pair): r for r in records if r.world == TWIN}
    candidates: dict[str, list[tuple[EpisodeRecord, EpisodeRecord | None]]] = {name: [] for name in CATEGORIES}
    for record in records:
        other = true.get((record.policy, record.task, *record.pair))
        if record.world != IMAGINED or (with_twin and other is None) or not store.has_trace(record):
            continue
        if other is not None and not store.has_trace(other):
            continue
        kind = (record.success, other.success if other else None)
        candidates[next(name for name, value in CATEGORIES.items() if value == kind)].append((record, other))
    chosen: dict[str, list[Clip]] = {}
    for name, episodes in candidates.items():
        clips = []
        for imagined, other in _varied(episodes, per_category):
            traces = [(store.trace(record), record) for record in (imagined, other) if record]
            frames = side_by_side([(trace, record.success) for trace, record in traces if trace])
            clips.append(Clip(imagined, other, encode_video(frames, PLAYBACK_FPS, _ENCODING)))
        if clips:
            chosen[name] = clips
    return chosen


def side_by_side(episodes: Sequence[tuple[Trace, bool]]) -> np.ndarray:
    """Join the frames of one or two episodes; the shorter one waits on its last frame.

    A bar under each runs with time and, when the episode has ended, turns green for success and red for failure.

    Args:
        episodes: (trace, success), frames (T + 1, H, W, 3) uint8 of one size and of any lengths.

    Returns:
        (longest T + 1 and some standing frames, H + bar, joined width, 3) uint8, height and width even.
    """
    longest = max(len(trace.frames) for trace, _ in episodes)
    num_frames = longest + PLAYBACK_FPS // 2  # time to see how it ended
    halves = []
    for trace, success in episodes:
        length, height, width, _ = trace.frames.shape
        panel = np.full((num_frames, height + _BAR, width, 3), _GROUND, np.uint8)
        panel[:, :height] = trace.frames[np.minimum(np.arange(num_frames), length - 1)]
        for t in range(num_frames):
            ended = t >= length - 1
            color = (_SOLVED if success else _FAILED) if ended else _RUNNING
            panel[t, height:, : round(width * min(t, length - 1) / (longest - 1)) or 1] = color
        halves += [panel, np.full((num_frames, height + _BAR, _GAP, 3), _GROUND, np.uint8)]
    joined = np.concatenate(halves[:-1], axis=2)
    return joined[:, : joined.shape[1] // 2 * 2, : joined.shape[2] // 2 * 2]


def _varied(
    episodes: Sequence[tuple[EpisodeRecord, EpisodeRecord | None]], count: int
) -> list[tuple[EpisodeRecord, EpisodeRecord | None]]:
    """Pick episodes one by one, each time from the task and then the policy picked least so far."""
    left, picked = list(episodes), []
    while left and len(picked) < count:
        tasks = [record.task for record, _ in picked]
        policies = [record.policy for record, _ in picked]
        best = min(left, key=lambda pair: (tasks.count(pair[0].task), policies.count(pair[0].policy)))
        left.remove(best)
        picked.append(best)
    return picked
