"""Curate plain video: find out about every file, decide about every clip, transcode, caption, and put into shards."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wfm_core.curation.captions import CaptionSettings, RefusedError, caption
from wfm_core.curation.clusters import SIMILAR, cluster, near_copies, standardised, surplus
from wfm_core.curation.duplicates import ALIKE, difference, duplicates
from wfm_core.curation.examine_video import ExamineSettings, VideoFindings, examine_video
from wfm_core.curation.rules import Rule, broken_rule
from wfm_core.curation.shards import shard_folder, write_shard
from wfm_core.curation.transcode import Span, TranscodeSettings, output_rate, output_size, transcode
from wfm_core.data.files import DataError, write_atomic
from wfm_core.data.video import decode_video
from wfm_core.data.video_folder import video_files
from worldsim.curation import (
    DUPLICATE,
    EXAMINED,
    KILLED,
    REPORT,
    UNREADABLE,
    Verdict,
    check_unchanged,
    examine_all,
    nothing_kept,
    other_settings_if_refused,
    work_through,
)
from worldsim.curation_video_report import Clips, load_clips, write_report
from worldsim.processes import run_all
from worldsim.recording import check_new, claimed

SIMILAR_TO, TOO_MANY, NOT_TRANSCODED = "similar", "too_many_alike", "not_transcoded"
STAGING = ".staging"
FAILED = "failed"  # folder of errors, <clip>.<stage>.txt, of what was kept and could not be made


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
    if settings.similar <= 1 or settings.most_per_cluster:  # else nobody asks for clusters
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
    out, videos = out.absolute(), [path.absolute() for path in videos]  # a worker's folder may be another one
    # Who is asked may move to another address while captions are written.
    begun = json.loads(json.dumps(deciding))
    begun["video"]["captions"]["url"] = bool(settings.captions.url)
    begun |= inputs | {"rules": {name: asdict(rule) for name, rule in rules.items()}}
    if not (out / "curate.json").exists():
        check_new(out, "curate", keep=(EXAMINED, *REPORT))
    check_unchanged(out / EXAMINED, data, listing)
    with claimed(out / EXAMINED, "examine", {"kind": "video", "examine": asdict(settings.examine)} | inputs, {}):
        examine_all(
            partial(examine_video, settings=settings.examine),
            videos,
            out / EXAMINED,
            killed=_killed,
            unit="video",
            **work,
        )
    clips = load_clips(out / EXAMINED, videos)
    judged, clusters = judge(clips, rules, settings)
    others = {
        UNREADABLE: "",
        DUPLICATE: f"> {settings.alike:g}",
        SIMILAR_TO: f"< {settings.similar:g}",
        TOO_MANY: "",
        NOT_TRANSCODED: "",
    }

    def account() -> dict[str, list[int]]:
        """Write the report, and say what goes into which shard, as far as it is known what can be made."""
        failed = _failures(out, "transcode")
        verdicts = [
            Verdict(NOT_TRANSCODED) if key in failed else verdict
            for key, verdict in zip(clips.keys, judged, strict=True)
        ]
        # What fails leaves a gap in its shard, so that no other clip moves.
        shards = plan_shards(clips, [k for k, verdict in enumerate(judged) if not verdict.reason], settings)
        shards = {path: [k for k in members if not verdicts[k].reason] for path, members in shards.items()}
        shards = {path: members for path, members in shards.items() if members}
        errors = failed | _failures(out, "caption")
        write_report(out, clips, verdicts, clusters, shards, errors, rules=rules, others=others, data=data)
        if not shards:
            for folder in (FAILED, STAGING):
                shutil.rmtree(out / folder, ignore_errors=True)
            reasons = [verdict.reason for verdict in verdicts] + [UNREADABLE] * len(clips.errors)
            raise nothing_kept(reasons, "clips and unreadable videos", out)
        return shards

    with claimed(out, "curate", begun, {}, keep=(EXAMINED, *REPORT)):
        with other_settings_if_refused(out):
            shards = account()
        known = _failures(out, "*")
        _make_clips(out, clips, shards, settings, work)
        if _failures(out, "*") != known:
            with other_settings_if_refused(out):
                shards = account()
        _make_shards(out, clips, shards, settings, work)
    kept = sum(map(len, shards.values()))
    return (
        f"{kept} of {len(judged)} clips of {len(videos)} videos kept, in {len(shards)} "
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


def _make_clips(
    out: Path, clips: Clips, shards: Mapping[str, Sequence[int]], settings: VideoSettings, work: Mapping[str, Any]
) -> None:
    """Transcode and caption what goes into shards that are not yet there."""
    staging = out / STAGING
    staging.mkdir(exist_ok=True)
    # Of a run that was killed; nobody else writes here.
    for folder in (out, staging, out / FAILED):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    waiting = [k for path in _missing(out, shards) for k in shards[path]]
    spans: dict[int, dict[str, Span]] = {}
    for k in waiting:
        spans.setdefault(int(clips.video[k]), {})[clips.keys[k]] = Span(*map(int, clips.spans[k]))

    def left(video: int) -> list[str]:
        places = {key: (_staged(out, key, "mp4"), _note(out, "transcode", key)) for key in spans[video]}
        return [key for key, ways in places.items() if not any(path.exists() for path in ways)]

    def give_up(video: int) -> None:
        for key in left(video):
            _fail(out, "transcode", key, KILLED)

    work_through(
        partial(_transcode, out, settings.transcode),
        {video: (clips.videos[video], each) for video, each in sorted(spans.items())},
        staging,
        is_done=lambda video: not left(video),
        give_up=give_up,
        name="transcode",
        unit="video",
        **work,
    )
    if settings.captions.url:
        made = [key for key in (clips.keys[k] for k in waiting) if _staged(out, key, "mp4").exists()]
        silent = [key for key in made if not _staged(out, key, "txt").exists()]
        _run("caption", partial(_caption, out, settings.captions), silent, work, len(silent))


def _make_shards(
    out: Path, clips: Clips, shards: Mapping[str, Sequence[int]], settings: VideoSettings, work: Mapping[str, Any]
) -> None:
    """Put the clips into shards that are not yet there."""
    for leftover in (out / "shards").rglob(".*.tmp"):
        leftover.unlink()
    missing = _missing(out, shards)

    def described(k: int) -> tuple[str, dict[str, Any], np.ndarray]:
        about = clips.described(k) | {"clip_fps": float(output_rate(clips.fps[k], settings.transcode))}
        return clips.keys[k], about, clips.embeddings[k]

    tasks = ((path, [described(k) for k in shards[path]]) for path in missing)
    _run("shard", partial(_write_shard, out), tasks, work, len(missing))
    shutil.rmtree(out / STAGING)


def _missing(out: Path, shards: Mapping[str, Sequence[int]]) -> list[str]:
    return [path for path in shards if not (out / path).exists()]


def _run(name: str, stage: Any, arguments: Iterable[Any], work: Mapping[str, Any], total: int) -> None:
    for _ in tqdm(run_all(stage, arguments, **work), total=total, desc=name, disable=not total):
        pass


def _killed(_: Path) -> VideoFindings:
    return VideoFindings(KILLED)


def _transcode(out: Path, settings: TranscodeSettings, _: int, task: tuple[Path, dict[str, Span]]) -> None:
    path, left = task[0], dict(task[1])
    try:
        for key, made in transcode(path, task[1], settings):
            del left[key]
            if isinstance(made, DataError):
                _fail(out, "transcode", key, made)
            else:
                write_atomic(_staged(out, key, "mp4"), made)
    except DataError as error:
        for key in left:
            _fail(out, "transcode", key, error)


def _caption(out: Path, settings: CaptionSettings, key: str) -> None:
    text = ""
    try:
        text = caption(decode_video(_staged(out, key, "mp4")), settings)
    except (RefusedError, DataError) as error:
        _fail(out, "caption", key, error)
    write_atomic(_staged(out, key, "txt"), text.encode())


def _write_shard(out: Path, task: tuple[str, list[tuple[str, dict[str, Any], np.ndarray]]]) -> None:
    path, members = task

    def sample(key: str, about: dict[str, Any], embedding: np.ndarray) -> tuple[str, dict[str, bytes]]:
        text, numbers = _staged(out, key, "txt"), io.BytesIO()
        about = about | {"caption": text.read_text() if text.exists() else ""}
        np.save(numbers, embedding)
        content = {"mp4": _staged(out, key, "mp4").read_bytes(), "json": json.dumps(about, indent=1).encode()}
        return key, content | {"npy": numbers.getvalue()}

    write_atomic(out / path, partial(write_shard, samples=(sample(*member) for member in members)))
    for key, *_ in members:
        for suffix in ("mp4", "txt"):
            _staged(out, key, suffix).unlink(missing_ok=True)


def _staged(out: Path, key: str, suffix: str) -> Path:
    return out / STAGING / f"{key}.{suffix}"


def _note(out: Path, stage: str, key: str) -> Path:
    return out / FAILED / f"{key}.{stage}.txt"


def _fail(out: Path, stage: str, key: str, error: object) -> None:
    write_atomic(_note(out, stage, key), " ".join(str(error).split()).encode())


def _failures(out: Path, stage: str) -> dict[str, str]:
    """Why clips, by key, could not be made at a stage, or at any."""
    found = sorted((out / FAILED).glob(_note(out, stage, "*").name))
    return {path.name.partition(".")[0]: path.read_text() for path in found}
