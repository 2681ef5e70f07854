"""What was found of all clips, in columns, and the report on it: manifest, card, histograms, contact sheet."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wfm_core.curation.rules import Rule
from wfm_core.data.files import write_atomic
from wfm_core.data.video_stream import picture_at
from worldsim.curation import (
    EXAMPLE_SIZE,
    UNREADABLE,
    Verdict,
    contact_sheet,
    drop_table,
    histograms,
    range_table,
    read_findings,
)

SHOWN = {"seconds": "s", "height": "pixels", "fps": "1/s", "change": "of 255 a step", "sharpness": "variance"}
"""Measures with a histogram on the card, and their units."""
ROWS = 10_000
"""Of the manifest, written at once."""


@dataclass(frozen=True)
class Clips:
    """All clips of all videos in the order of the input, about half a kilobyte each.

    Attributes:
        videos: input files.
        errors: of those that could not be read, by number.
        video: (N,) int64, number of each clip's video.
        spans: (N, 2) int64, its first frame and their number.
        starts: (N,) float64, seconds.
        fps: N, of the video.
        names: of the measures.
        measures: (N, M) float64.
        tags: N, its camera's motions, joined by a blank.
        prints: (N, bytes) uint8, fingerprints.
        embeddings: (N, D) float32.
    """

    videos: Sequence[Path]
    errors: Mapping[int, str]
    video: np.ndarray
    spans: np.ndarray
    starts: np.ndarray
    fps: Sequence[Fraction]
    names: Sequence[str]
    measures: np.ndarray
    tags: Sequence[str]
    prints: np.ndarray
    embeddings: np.ndarray
    keys: Sequence[str]

    def column(self, name: str) -> np.ndarray:
        """A measure of all clips, (N,) float64."""
        return self.measures[:, self.names.index(name)] if len(self.measures) else np.zeros(0)

    def value(self, k: int, name: str) -> float:
        """A measure of clip k."""
        return float(self.measures[k, self.names.index(name)])

    def described(self, k: int) -> dict[str, Any]:
        """What a reader of clip k's shard is told about it."""
        return {
            "source": str(self.videos[self.video[k]]),
            "first_frame": int(self.spans[k, 0]),
            "start_s": float(self.starts[k]),
            "tags": self.tags[k].split(),
            "measures": dict(zip(self.names, self.measures[k].tolist(), strict=True)),
        }


def load_clips(folder: Path, videos: Sequence[Path]) -> Clips:
    """Read what `examine_all` found of the videos."""
    errors: dict[int, str] = {}
    rows: dict[str, list[Any]] = {name: [] for name in ("video", "span", "start", "measures", "print", "embedding")}
    fps: list[Fraction] = []
    tags: list[str] = []
    keys: list[str] = []
    names: list[str] = []
    for number, found in enumerate(read_findings(folder, len(videos))):
        if found["error"]:
            errors[number] = found["error"]
        for index, clip in enumerate(found["clips"]):
            names = names or list(clip["measures"])
            rows["video"].append(number)
            rows["span"].append((clip["first"], clip["num_frames"]))
            rows["start"].append(clip["start_s"])
            rows["measures"].append(np.array([clip["measures"][name] for name in names]))
            rows["print"].append(np.frombuffer(bytes.fromhex(clip["fingerprint"]), np.uint8))
            rows["embedding"].append(np.array(clip["embedding"], np.float32))
            fps.append(Fraction(*clip["fps"]))
            tags.append(" ".join(clip["tags"]))
            keys.append(f"{number:07d}-{index:05d}")
    columns = {name: np.array(each) for name, each in rows.items()}
    return Clips(
        videos, errors, columns["video"].astype(int), columns["span"].reshape(-1, 2).astype(int), columns["start"], fps,
        names, columns["measures"], tags, columns["print"].astype(np.uint8), columns["embedding"], keys,
    )  # fmt: skip


def write_report(
    out: Path,
    clips: Clips,
    verdicts: Sequence[Verdict],
    clusters: np.ndarray,
    shards: Mapping[str, Sequence[int]],
    errors: Mapping[str, str],
    *,
    rules: Mapping[str, Rule],
    others: Mapping[str, str],
    data: Sequence[str],
) -> None:
    """Write manifest.parquet, CARD.md, histograms.png and contact.png.

    Args:
        out: where to.
        clips: all of them.
        verdicts: on each.
        clusters: (N,) in which each is, or -1.
        shards: path -> clips in it.
        errors: key -> what went wrong in the making of a clip that was kept.
        rules: by name, which is a reason.
        others: reasons that are no rules, and within what is kept.
        data: what was curated.
    """
    write_atomic(out / "manifest.parquet", partial(_write_manifest, clips, verdicts, clusters, shards, errors, rules))
    write_atomic(out / "CARD.md", _card(clips, verdicts, errors, rules, others, data).encode())
    write_atomic(out / "histograms.png", _histograms(clips, verdicts))
    write_atomic(out / "contact.png", contact_sheet(verdicts, partial(_middle_picture, clips)))


def _write_manifest(
    clips: Clips,
    verdicts: Sequence[Verdict],
    clusters: np.ndarray,
    shards: Mapping[str, Sequence[int]],
    errors: Mapping[str, str],
    rules: Mapping[str, Rule],
    file: Any,
) -> None:
    shard_of = {k: path for path, members in shards.items() for k in members}

    def clip_row(k: int) -> dict[str, Any]:
        verdict, rule = verdicts[k], rules.get(verdicts[k].reason)
        return {
            "item": clips.keys[k],
            "data": str(clips.videos[clips.video[k]]),
            "first_frame": clips.spans[k, 0],
            "start_s": clips.starts[k],
            "kept": not verdict.reason,
            "reason": verdict.reason,
            "value": None if np.isnan(verdict.value) else verdict.value,
            "low": rule.low if rule else None,
            "high": rule.high if rule else None,
            "kept_instead": clips.keys[verdict.kept_instead] if verdict.kept_instead >= 0 else "",
            "error": errors.get(clips.keys[k], ""),
            "tags": clips.tags[k],
            "cluster": clusters[k] if clusters[k] >= 0 else None,
            "shard": shard_of.get(k, ""),
        } | dict(zip(clips.names, clips.measures[k], strict=True))

    def error_row(video: int) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(("reason", "kept_instead", "tags", "shard"), "")
        row |= {"item": f"{video:07d}", "data": str(clips.videos[video]), "kept": False, "reason": UNREADABLE}
        return row | {"error": clips.errors[video]}

    kinds = {"item": pa.string(), "data": pa.string(), "first_frame": pa.int64(), "start_s": pa.float64()}
    kinds |= {"kept": pa.bool_(), "reason": pa.string()} | dict.fromkeys(("value", "low", "high"), pa.float64())
    kinds |= dict.fromkeys(("kept_instead", "error", "tags"), pa.string())
    kinds |= {"cluster": pa.int64(), "shard": pa.string()} | dict.fromkeys(clips.names, pa.float64())
    # Clips and files in the order of the input.
    places = [(int(video), 0, k) for k, video in enumerate(clips.video)] + [(video, 1, video) for video in clips.errors]
    places.sort()
    with pq.ParquetWriter(file, schema := pa.schema(kinds)) as writer:
        for start in range(0, len(places), ROWS):
            rows = [error_row(k) if failed else clip_row(k) for _, failed, k in places[start : start + ROWS]]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _card(
    clips: Clips,
    verdicts: Sequence[Verdict],
    errors: Mapping[str, str],
    rules: Mapping[str, Rule],
    others: Mapping[str, str],
    data: Sequence[str],
) -> str:
    counts = Counter(verdict.reason for verdict in verdicts) + Counter({UNREADABLE: len(clips.errors)})
    kept = np.array([not verdict.reason for verdict in verdicts])
    hours = clips.column("seconds")[kept].sum() / 3600
    silent = [errors[clips.keys[k]] for k in np.flatnonzero(kept) if clips.keys[k] in errors]
    tags = Counter(tag for k in np.flatnonzero(kept) for tag in clips.tags[k].split())
    lines = [
        "# Curated video",
        "",
        f"{counts['']} of {len(verdicts)} clips kept, {hours:.3g} hours, of {len(clips.videos)} videos from "
        f"{', '.join(data)}.",
        "",
        *drop_table(counts, rules, others, "clips, or unreadable videos"),
        "",
        *([f"{len(silent)} of the kept have no caption; of the first it is said: {silent[0]}", ""] if silent else []),
        "| camera | clips kept |",
        "|---|---|",
        *(f"| {tag} | {count} |" for tag, count in sorted(tags.items())),
        "",
        *range_table({name: clips.column(name)[kept] for name in clips.names}),
        "",
        "![Histograms of what was kept and dropped](histograms.png)",
        "",
        "Examples of each, from the middle of the clip:",
        "",
        "![Kept and dropped clips](contact.png)",
        "",
    ]
    return "\n".join(lines)


def _histograms(clips: Clips, verdicts: Sequence[Verdict]) -> bytes:
    kept = np.array([not verdict.reason for verdict in verdicts])
    values = {f"{name}, {unit}": clips.column(name) for name, unit in SHOWN.items()}
    return histograms(values, kept, "clips", {"camera": clips.tags})


def _middle_picture(clips: Clips, k: int) -> np.ndarray:
    second = clips.starts[k] + clips.value(k, "seconds") / 2
    return picture_at(clips.videos[clips.video[k]], second, *EXAMPLE_SIZE)
