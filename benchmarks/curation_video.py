"""How well shots and burnt-in text are told in real videos, and how fast the stages of curation are.

    python benchmarks/curation_video.py path/to/videos [more ...]

Shots: clips of the videos, of random lengths and in random order, are joined to edited videos, encoded, and split; a
cut counts as found at its very frame. Text: clips with captions burnt in, in random fonts, sizes, places and colours,
against the same clips as they are; those that show writing of their own count as false alarms. Videos should have no
cuts and no captions of their own. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from wfm_core.curation.examine_video import ExamineSettings, examine_video
from wfm_core.curation.rules import VIDEO_RULES
from wfm_core.curation.split import TEXT_LINES, SplitSettings, split_video
from wfm_core.curation.text_overlay import LOOKS, count_letters
from wfm_core.curation.transcode import Span, TranscodeSettings, transcode
from wfm_core.data.video import VideoEncoding, decode_video, encode_video, resize_frames
from wfm_core.data.video_folder import video_files
from wfm_core.data.video_stream import stream_video

WORDS = "pick up the spoon|www.example.com|Episode 12, 2x speed|2021-07-23 14:05:33|SUCCESS|put the carrot on the plate"
FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_PLAIN, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX)
COLORS = ((255, 255, 255), (255, 255, 0), (0, 0, 0), (255, 60, 60))
HEIGHTS = 0.045, 0.1
"""Least and greatest height of a letter, of the picture's."""
SIZE, FPS = (240, 320), 15
ENCODED = VideoEncoding("libx264", "yuv420p", (("crf", "23"), ("preset", "veryfast")))


def edited(videos: Sequence[np.ndarray], num_shots: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Join parts of `videos` (T, H, W, 3), no two in a row of the same one; also says where shots begin."""
    parts: list[np.ndarray] = []
    last = -1
    while len(parts) < num_shots:
        k = int(rng.integers(len(videos)))
        if k == last:
            continue
        last, frames = k, videos[k]
        length = int(rng.integers(min(FPS, len(frames)), min(6 * FPS, len(frames)) + 1))
        start = int(rng.integers(len(frames) - length + 1))
        parts.append(frames[start : start + length])
    return np.concatenate(parts), np.cumsum([len(part) for part in parts])[:-1].tolist()


def shot_figures(videos: Sequence[np.ndarray], count: int, folder: Path, seed: int = 0) -> dict[str, float]:
    """Precision, recall and F1 of the cuts in `count` edited videos of a dozen shots."""
    rng = np.random.default_rng(seed)
    right = found = there = 0
    for _ in range(count):
        frames, cuts = edited(videos, 12, rng)
        (path := folder / "edited.mp4").write_bytes(encode_video(frames, FPS, ENCODED))
        starts = {clip.first for clip in split_video(stream_video(path), SplitSettings(longest=1e9))} - {0}
        right, found, there = right + len(starts & set(cuts)), found + len(starts), there + len(cuts)
    precision, recall = right / max(found, 1), right / there
    f1 = 2 * right / (found + there)
    return {"shot_precision": precision, "shot_recall": recall, "shot_f1": f1, "shot_cuts": there}


def captioned(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Burn a line of text into all frames: plain, with an outline, or on a box."""
    height, width = frames.shape[1:3]
    text, font = rng.choice(WORDS.split("|")), int(rng.choice(FONTS))
    color = COLORS[rng.integers(len(COLORS))]
    style = rng.choice(["outline", "box"] if color == (0, 0, 0) else ["plain", "outline", "box"])
    against = (255, 255, 255) if color == (0, 0, 0) else (0, 0, 0)
    tall = round(rng.uniform(*HEIGHTS) * height)
    thick = 1 if tall < 14 else 2
    scale = cv2.getFontScaleFromHeight(font, tall, thick)
    (long, _), below = cv2.getTextSize(text, font, scale, thick)
    x = int(rng.integers(4, max(5, width - long - 4)))
    y = int(rng.choice([tall + 8, height - below - 8, rng.integers(tall + 8, height - below - 8)]))
    frames = frames.copy()
    for frame in frames:
        if style == "box":
            cv2.rectangle(frame, (x - 4, y - tall - 4), (x + long + 4, y + below + 4), against, -1)
        if style == "outline":
            cv2.putText(frame, text, (x, y), font, scale, against, thick + 2, cv2.LINE_AA)
        cv2.putText(frame, text, (x, y), font, scale, color, thick, cv2.LINE_AA)
    return frames


def text_figures(videos: Sequence[np.ndarray], folder: Path, seed: int = 0) -> dict[str, float]:
    """Precision and recall of the rule on captions, each video once with and once without."""
    rng, limit = np.random.default_rng(seed), VIDEO_RULES["text_overlay"].high

    def has_text(frames: np.ndarray) -> bool:
        (path := folder / "text.mp4").write_bytes(encode_video(frames, FPS, ENCODED))
        looks = np.linspace(0, len(frames) - 1, LOOKS).round().astype(int)
        width = round(frames.shape[2] * TEXT_LINES / frames.shape[1])
        return count_letters(resize_frames(decode_video(path)[looks], TEXT_LINES, width)) > limit

    false = sum(has_text(frames) for frames in videos)
    right = sum(has_text(captioned(frames, rng)) for frames in videos)
    return {"text_precision": right / max(right + false, 1), "text_recall": right / len(videos)}


def speed_figures(paths: Sequence[Path]) -> dict[str, float]:
    """Clips and frames per second of each stage, in one process."""
    start = time.perf_counter()
    spans = []
    for path in paths:
        found = examine_video(path, ExamineSettings()).clips
        spans.append({str(k): Span(clip.first, clip.num_frames) for k, clip in enumerate(found)})
    middle = time.perf_counter()
    count = sum(len(list(transcode(*each, TranscodeSettings()))) for each in zip(paths, spans, strict=True))
    seconds = {"examine": middle - start, "transcode": time.perf_counter() - middle}
    frames = sum(span.num_frames for each in spans for span in each.values())
    rates = {f"{name}_clips_per_s": count / each for name, each in seconds.items()}
    return rates | {f"{name}_frames_per_s": frames / each for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", help="folders of videos, and videos")
    parser.add_argument("--edited", type=int, default=30, help="edited videos that are made and split")
    parser.add_argument("--quick", action="store_true", help="fewer videos: for trying it out, not for figures")
    arguments = parser.parse_args()
    paths = [path for place in arguments.videos for path in video_files(Path(place))]
    paths = paths[:6] if arguments.quick else paths
    videos = [resize_frames(decode_video(path), *SIZE) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        figures = shot_figures(videos, 2 if arguments.quick else arguments.edited, Path(folder))
        figures |= text_figures(videos, Path(folder)) | speed_figures(paths)
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps(rounded | {"num_videos": len(paths), "quick": arguments.quick}, allow_nan=False))


if __name__ == "__main__":
    main()
