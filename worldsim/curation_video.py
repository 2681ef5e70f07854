"""Curate plain video: find out about every file, decide about every clip, transcode, caption, and put into shards."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wfm_core.curation.captions import CaptionSettings, caption
from wfm_core.curation.clusters import SIMILAR, cluster, near_copies, standardised, surplus
from wfm_core.curation.duplicates import ALIKE, difference, duplicates
from wfm_core.curation.examine_video import ExamineSettings, VideoFindings, examine_video
from wfm_core.curation.rules import Rule, broken_rule
from wfm_core.curation.shards import shard_folder, write_shard
from wfm_core.curation.transcode import Span, TranscodeSettings, output_rate, output_size, transcode
from wfm_core.data.files import write_atomic
from wfm_core.data.video import decode_video
from wfm_core.data.video_folder import video_files
from worldsim.curation import DUPLICATE, EXAMINED, KILLED, UNREADABLE, Verdict, examine_all, nothing_kept
from worldsim.curation_video_report import Clips, load_clips, write_report
from worldsim.processes import run_all
from worldsim.recording import check_new, claimed

SIMILAR_TO, TOO_MANY = "similar", "too_many_alike"
STAGING = ".staging"


@dataclass
class VideoSettings:
    """What is done with videos.

    Attributes:
        examine: how they are split and looked at.
        alike: share of a fingerprint's cells that may differ in clips that are the same one; below 0 keeps all.
        similar: cosine of two clips' embeddings, standardised over all clips, from which on they are near copies;
            above 1 keeps all.
        clusters: of k-means, within which near copies are looked for; 0 is the square root of the number of clips.
        most_per_cluster: clips kept of a cluster, evenly spread over it; 0 is all.
        most_per_tag: clips kept of those with the same camera motion; 0 is all.
        transcode: the form of the kept clips.
        captions: whom to ask for captions; nobody, unless there is a url.
        shard: clips in a tar file, at most.
    """

    examine: ExamineSettings = field(default_factory=ExamineSettings)
    alike: float = ALIKE
    similar: float = SIMILAR
    clusters: int = 0
    most_per_cluster: int = 0
    most_per_tag: int = 0
    transcode: TranscodeSettings = field(default_factory=TranscodeSettings)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    shard: int = 512

    def __post_init__(self) -> None:
        if self.shard < 1 or min(self.clusters, self.most_per_cluster, self.most_per_tag) < 0:
            raise ValueError("shard must be >= 1, and clusters, most_per_cluster and most_per_tag >= 0")


def judge(clips: Clips, rules: Mapping[str, Rule], settings: VideoSettings) -> tuple[list[Verdict], np.ndarray]:
    """Decide about every clip, from what was found of all of them; also says in which cluster each is, or -1."""
    verdicts = []
    for row in clips.measures:
        measures = dict(zip(clips.names, row.tolist(), strict=True))
        broken = broken_rule(measures, rules)
        verdicts.append(Verdict(broken, measures[rules[broken].measure]) if broken else Verdict())

    def left() -> np.ndarray:
        return np.array([k for k, verdict in enumerate(verdicts) if not verdict.reason], int)

    sizes = clips.column("height") * clips.column("width")
    looks = clips.column("seconds") * settings.examine.split.fps  # as many for copies of any frame rate
    rest = left()
    for copy, kept in duplicates(
        clips.prints[rest], looks[rest].tolist(), sizes[rest].tolist(), settings.alike
    ).items():
        apart = difference(clips.prints[rest[copy]], clips.prints[rest[kept]])
        verdicts[rest[copy]] = Verdict(DUPLICATE, float(apart), int(rest[kept]))
    rest, clusters = left(), np.full(len(verdicts), -1)
    vectors = standardised(clips.embeddings[rest])
    clusters[rest] = cluster(vectors, settings.clusters)
    similar = near_copies(vectors, clusters[rest], sizes[rest].tolist(), settings.similar)
    for copy, (kept, cosine) in similar.items():
        verdicts[rest[copy]] = Verdict(SIMILAR_TO, cosine, int(rest[kept]))
    for groups, most in ((clusters, settings.most_per_cluster), (clips.tags, settings.most_per_tag)):
        rest = left()
        for gone, size in (surplus([groups[k] for k in rest], most) if most else {}).items():
            verdicts[rest[gone]] = Verdict(TOO_MANY, float(size))
    return verdicts, clusters


def curate_videos(
    settings: VideoSettings,
    *,
    data: Sequence[str],
    out: Path,
    rules: Mapping[str, Rule],
    deciding: Mapping[str, Any],
    workers: int,
    executor: str,
) -> str:
    """Make shards of the clips that are worth it, and account for all; goes on where it stopped.

    Args:
        settings: what is done.
        data: folders of videos, and videos.
        out: folder of the shards, new or begun with the same settings.
        rules: within which clips are kept.
        deciding: settings of the command that decide what is made, see `recording.deciding`.
        workers: see `run_all`.
        executor: see `run_all`.

    Returns:
        One line for the user.

    Raises:
        ValueError: no videos, nothing that is kept, or `out` holds something else.
        OSError: the disk is full, or who writes captions does not answer; what is done so far is kept.
    """
    # Libraries that start a thread per core in each worker would only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work: dict[str, Any] = {"workers": workers, "executor": executor}
    videos = [path for folder in data for path in video_files(Path(folder))]
    sizes = {path: path.stat().st_size if path.exists() else -1 for path in videos}  # a dangling link is unreadable
    listing = hashlib.sha256("".join(f"{path}\0{size}\n" for path, size in sizes.items()).encode()).hexdigest()
    inputs = {"data": list(data), "num_videos": len(videos), "listing": listing}
    # Who is asked may move to another address while captions are written.
    begun = json.loads(json.dumps(deciding))
    begun["video"]["captions"]["url"] = bool(settings.captions.url)
    begun |= inputs | {"rules": {name: asdict(rule) for name, rule in rules.items()}}
    if not (out / "curate.json").exists():
        check_new(out, "curate", keep=(EXAMINED,))
    with claimed(out / EXAMINED, "examine", {"kind": "video", "examine": asdict(settings.examine)} | inputs, {}):
        examine_all(
            partial(_examine, videos, settings.examine),
            len(videos),
            out / EXAMINED,
            killed=_killed,
            unit="video",
            **work,
        )
    clips = load_clips(out / EXAMINED, videos)
    verdicts, clusters = judge(clips, rules, settings)
    kept = [k for k, verdict in enumerate(verdicts) if not verdict.reason]
    if not kept:
        reasons = [verdict.reason for verdict in verdicts] + [UNREADABLE] * len(clips.errors)
        raise nothing_kept(reasons, "clips and unreadable videos")
    shards = plan_shards(clips, kept, settings)
    with claimed(out, "curate", begun, {}, keep=(EXAMINED,)):
        others = {
            UNREADABLE: "",
            DUPLICATE: f"> {settings.alike:g}",
            SIMILAR_TO: f"< {settings.similar:g}",
            TOO_MANY: "",
        }
        write_report(out, clips, verdicts, clusters, shards, rules=rules, others=others, data=data)
        _make_shards(out, clips, shards, settings, work)
    return (
        f"{len(kept)} of {len(verdicts)} clips of {len(videos)} videos kept, in {len(shards)} "
        f"shards in {out.resolve()}; {out / 'CARD.md'} says what was dropped"
    )


def plan_shards(clips: Clips, kept: Sequence[int], settings: VideoSettings) -> dict[str, list[int]]:
    """Say which shard, by its path, holds which clips, in the order of the input."""
    folders: dict[str, list[int]] = {}
    form = settings.transcode
    for k in kept:
        height, width = output_size(int(clips.value(k, "height")), int(clips.value(k, "width")), form.side)
        num_frames = clips.value(k, "seconds") * form.fps if form.fps else clips.value(k, "num_frames")
        folders.setdefault(shard_folder(height, width, int(num_frames)), []).append(k)
    return {
        f"shards/{folder}/part-{number:06d}.tar": members[start : start + settings.shard]
        for folder, members in sorted(folders.items())
        for number, start in enumerate(range(0, len(members), settings.shard))
    }


def _make_shards(
    out: Path, clips: Clips, shards: Mapping[str, Sequence[int]], settings: VideoSettings, work: Mapping[str, Any]
) -> None:
    staging = out / STAGING
    staging.mkdir(exist_ok=True)
    # Of a run that was killed; nobody else writes here.
    for leftover in [*out.glob(".*.tmp"), *staging.glob(".*.tmp"), *(out / "shards").rglob(".*.tmp")]:
        leftover.unlink()
    missing = [path for path in shards if not (out / path).exists()]
    waiting = [k for path in missing for k in shards[path]]
    per_video: dict[int, list[int]] = {}
    for k in waiting:
        if not _staged(staging, clips.keys[k], "mp4").exists():
            per_video.setdefault(int(clips.video[k]), []).append(k)
    uncaptioned = [k for k in waiting if not _staged(staging, clips.keys[k], "txt").exists()]
    stages: list[tuple[str, Any, Sequence[Any]]] = [
        ("transcode", partial(_transcode, clips, per_video, staging, settings.transcode), sorted(per_video)),
        ("caption", partial(_caption, clips, staging, settings.captions), uncaptioned if settings.captions.url else []),
        ("shard", partial(_write_shard, out, clips, shards, settings.transcode), missing),
    ]
    for name, stage, arguments in stages:
        for _ in tqdm(run_all(stage, arguments, **work), total=len(arguments), desc=name, disable=not arguments):
            pass
    shutil.rmtree(staging)


def _examine(videos: Sequence[Path], settings: ExamineSettings, k: int) -> VideoFindings:
    return examine_video(videos[k], settings)


def _killed(k: int) -> VideoFindings:
    return VideoFindings(KILLED)


def _transcode(
    clips: Clips, per_video: Mapping[int, Sequence[int]], staging: Path, settings: TranscodeSettings, video: int
) -> None:
    spans = {clips.keys[k]: Span(*clips.spans[k]) for k in per_video[video]}
    for key, content in transcode(clips.videos[video], spans, settings):
        write_atomic(_staged(staging, key, "mp4"), content)


def _caption(clips: Clips, staging: Path, settings: CaptionSettings, k: int) -> None:
    frames = decode_video(_staged(staging, clips.keys[k], "mp4"))
    write_atomic(_staged(staging, clips.keys[k], "txt"), caption(frames, settings).encode())


def _write_shard(
    out: Path, clips: Clips, shards: Mapping[str, Sequence[int]], settings: TranscodeSettings, path: str
) -> None:
    staging = out / STAGING

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for k in shards[path]:
            key = clips.keys[k]
            text = _staged(staging, key, "txt")
            described = clips.described(k) | {"caption": text.read_text() if text.exists() else ""}
            described["clip_fps"] = float(output_rate(clips.fps[k], settings))
            embedding = io.BytesIO()
            np.save(embedding, clips.embeddings[k])
            yield (
                key,
                {
                    "mp4": _staged(staging, key, "mp4").read_bytes(),
                    "json": json.dumps(described, indent=1).encode(),
                    "npy": embedding.getvalue(),
                },
            )

    write_atomic(out / path, partial(write_shard, samples=samples()))
    for k in shards[path]:
        for suffix in ("mp4", "txt"):
            _staged(staging, clips.keys[k], suffix).unlink(missing_ok=True)


def _staged(staging: Path, key: str, suffix: str) -> Path:
    return staging / f"{key}.{suffix}"
