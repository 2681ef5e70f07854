"""Curate robot data or plain video: keep what is worth training on, and account for everything else.

    worldsim-curate 'data=[path/to/bridge,path/to/mine]' out=runs/curated size=128
    worldsim-curate 'data=[runs/demos]' out=runs/strict '+rules={gripper_never_moves: {low: 0.5}, frozen: {high: 0.2}}'
    worldsim-curate kind=video 'data=[path/to/videos]' out=runs/clips video.transcode.side=240

Episodes: data sets of any known format (see worldsim-convert --help) become one LeRobotDataset v3.0, as one camera saw
them: the first one, or that which '+options={camera: <name>}' names, with views={<name>: <camera>} among the options
as further ones did; the card says what others of LeRobot data sets are left out. Dropped is what cannot be read, what
breaks a rule (too short, dark, frozen, cut, shaky, idle, teleports, actions that fit neither frames nor states, ...),
and of episodes that are there twice, at whatever size and encoding, all but the largest.
Plain video: every file is split at its cuts and into clips of bounded length; dropped is what cannot be read, what
breaks a rule (too brief, dark, static, shaky, burnt-in text, ...), copies and near copies but the largest one, and what
a balance has too much of (off by default); the rest is transcoded, captioned (off by default), and put into tar shards
in the layout of WebDataset, by resolution, aspect and length.
Beside them `out` holds manifest.parquet, in which every input is found with all that was measured of it, and by what
and at which value it was dropped; and CARD.md with histograms of what was measured and examples of each. A file that
kills its reader costs itself alone, if there are workers. Interrupt it and start it again with the same settings: it
goes on where it stopped.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wfm_core.curation.duplicates import ALIKE, difference, duplicates
from wfm_core.curation.examine import Findings, Item, count_items, examine, frame_rate, other_cameras, read_item
from wfm_core.curation.instructions import normalise_instruction
from wfm_core.curation.rules import RULES, VIDEO_RULES, Rule, broken_rule, changed_rules
from wfm_core.data.episode import UNKNOWN_ACTIONS, Episode
from wfm_core.data.files import DataError, listing, write_atomic
from wfm_core.data.video import ENCODINGS, resize_frames
from worldsim.commands.entry import launch, register
from worldsim.curation import (
    DUPLICATE,
    EXAMINED,
    EXAMPLE_SIZE,
    KILLED,
    REPORT,
    UNREADABLE,
    Verdict,
    check_unchanged,
    contact_sheet,
    drop_table,
    examine_all,
    histograms,
    nothing_kept,
    other_settings_if_refused,
    range_table,
    read_findings,
)
from worldsim.curation_video import VideoSettings, curate_videos
from worldsim.processes import EXECUTORS
from worldsim.recording import check_new, claimed, deciding, make_dataset

if TYPE_CHECKING:  # judging takes torch, curating does not
    from worldsim.simulator import WorldSim

NO_ACTIONS = "no_actions"
SHOWN = {
    "num_frames": "frames",
    "change": "of 255 a step",
    "sharpness": "variance",
    "idle": "share of steps",
    "state_match": "R2",
    "frame_match": "R2",
}
"""Measures with a histogram on the card, and their units."""
KINDS = {"episodes": RULES, "video": VIDEO_RULES}


@dataclass
class CurateConfig:
    """What to curate.

    Attributes:
        data: folders of data sets, or folders of videos and videos.
        out: folder of the new one.
        kind: "episodes" of robots, or "video".
        options: of the formats' readers.
        rules: other limits than `RULES` or `VIDEO_RULES` of `wfm_core.curation.rules`, as {dark: {high: 0.5}}.
        alike: share of a fingerprint's cells that may differ in episodes that are the same one; below 0 keeps all.
        size: height and width of an episode's frames, whatever their aspect was; 0 leaves them as they are.
        relabel: replace actions by what was reached.
        normalise: write instructions in one spelling, since "Put it down." and "put it down" are one task.
        success_by: checkpoint whose success head says of every frame how surely the task is done, as a label
            `success_probability`; NaN where it does not know the instruction or the arm's pose. "": nobody is asked.
        encoding: of episodes, "lossless" (pixels as they were decoded) or "compact" (yuv420p, plays everywhere).
        video: what is done with videos.
        workers: processes; 0 does everything in this one. Does not change what comes out.
        executor: "local", or "ray" for a cluster (see `worldsim.processes.run_all`). Does not change it either.
    """

    data: list[str] = field(default_factory=list)
    out: str = "runs/curated"
    kind: str = "episodes"
    options: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    alike: float = ALIKE
    size: int = 0
    relabel: bool = False
    normalise: bool = True
    success_by: str = ""
    encoding: str = "lossless"
    video: VideoSettings = field(default_factory=VideoSettings)
    workers: int = 2
    executor: str = "local"

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must be folders of data sets, got none; say 'data=[<folder>]'")
        for name, known in (("kind", KINDS), ("encoding", ENCODINGS), ("executor", EXECUTORS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be among {', '.join(known)}, got {getattr(self, name)}")
        if self.encoding == "compact" and self.size % 2:
            raise ValueError(f"encoding=compact needs an even size, got {self.size}")
        for name in ("size", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        changed_rules(self.rules, KINDS[self.kind])


def judge(findings: Sequence[Findings], rules: Mapping[str, Rule], alike: float) -> list[Verdict]:
    """Decide about every item, from what was found of all of them."""
    verdicts = []
    for found in findings:
        broken = broken_rule(found.measures, rules)
        if found.error:
            verdicts.append(Verdict(UNREADABLE))
        elif found.convention == UNKNOWN_ACTIONS:
            verdicts.append(Verdict(NO_ACTIONS))
        elif broken:
            verdicts.append(Verdict(broken, found.measures[rules[broken].measure]))
        else:
            verdicts.append(Verdict())
    left = [k for k, verdict in enumerate(verdicts) if not verdict.reason]
    prints = np.array([list(bytes.fromhex(findings[k].fingerprint)) for k in left], np.uint8)
    sizes = [findings[k].measures["height"] * findings[k].measures["width"] for k in left]
    lengths = [findings[k].measures["num_frames"] for k in left]
    for copy, kept in duplicates(prints, lengths, sizes, alike).items():
        verdicts[left[copy]] = Verdict(DUPLICATE, float(difference(prints[copy], prints[kept])), left[kept])
    return verdicts


def run(config: CurateConfig) -> None:
    """Examine what is not yet examined, decide, write what is kept and account for all.

    Raises:
        ValueError: no data set, data that have changed since they were examined, nothing that is kept, episodes that do
            not go together, or `out` holds something else or lies within the data.
        OSError: the disk is full; what is done so far is kept.
    """
    rules = changed_rules(config.rules, KINDS[config.kind])
    for data in config.data:
        if Path(config.out).absolute().is_relative_to(Path(data).absolute()):
            raise ValueError(f"out must not lie within data, got {config.out} in {data}")
    if config.kind == "video":
        summary = curate_videos(
            config.video,
            data=config.data,
            out=Path(config.out),
            rules=rules,
            deciding=deciding(config),
            workers=config.workers,
            executor=config.executor,
        )
        print(summary)
    else:
        _curate_episodes(config, rules)


def _curate_episodes(config: CurateConfig, rules: Mapping[str, Rule]) -> None:
    # Absolute, since a worker's folder may be another one.
    out, options = Path(config.out).absolute(), json.dumps(config.options)
    folders = [str(Path(data).absolute()) for data in config.data]
    items = [Item(data, options, k) for data in folders for k in range(count_items(data, options))]
    resolved = {"rules": {name: asdict(rule) for name, rule in rules.items()}, "num_episodes": len(items)}
    settings = deciding(config) | resolved
    # Of a folder begun before there was the setting: its instructions stay as they were.
    defaults = asdict(CurateConfig(config.data)) | {"normalise": False}
    own: dict[str, Any] = {"command": "curate", "settings": settings, "defaults": defaults}
    if not (out / "curate.json").exists():
        check_new(out, "curate", keep=(EXAMINED, *REPORT))
    # What was found of the episodes serves other settings, too, as long as nothing is made of it.
    now = hashlib.sha256("".join(map(listing, map(Path, folders))).encode()).hexdigest()
    seen = {name: settings[name] for name in ("data", "options", "num_episodes")} | {"listing": now}
    check_unchanged(out / EXAMINED, config.data, now)
    with claimed(out / EXAMINED, "examine", seen, {"listing": now}):
        examine_all(
            examine,
            items,
            out / EXAMINED,
            killed=_killed,
            unit="episode",
            workers=config.workers,
            executor=config.executor,
        )
        findings = [Findings(**found) for found in read_findings(out / EXAMINED, len(items))]
    verdicts = judge(findings, rules, config.alike)
    kept = [k for k, verdict in enumerate(verdicts) if not verdict.reason]
    rates = {frame_rate(items[k].data, options) for k in kept}
    with claimed(out, **own, keep=(EXAMINED, *REPORT)), other_settings_if_refused(out):
        _write_manifest(out / "manifest.parquet", items, findings, verdicts, rules)
        left_out = {folder: other_cameras(folder, options) for folder in folders}
        write_atomic(out / "CARD.md", _card(config, findings, verdicts, rules, left_out).encode())
        write_atomic(out / "histograms.png", _histograms(findings, verdicts))
        write_atomic(out / "contact.png", contact_sheet(verdicts, partial(_middle_frame, items)))
        if not kept:
            raise nothing_kept((verdict.reason for verdict in verdicts), "episodes", out)
        _check_alike(config, [findings[k] for k in kept], rates)
    labels = sorted(set.intersection(*(set(findings[k].labels) for k in kept)))
    make_episode = partial(_curated, [(items[k], findings[k].item_id) for k in kept], labels, config)
    work: dict[str, Any] = {"workers": config.workers, "executor": config.executor}
    make_dataset(out, make_episode, len(kept), encoding=config.encoding, fps=rates.pop(), **work, **own)
    print(f"{len(kept)} of {len(items)} episodes kept in {out.resolve()}; {out / 'CARD.md'} says what was dropped")


def _killed(item: Item) -> Findings:
    return Findings(f"{Path(item.data).name}[{item.index}]", error=KILLED)


def _check_alike(config: CurateConfig, findings: Sequence[Findings], rates: set[float]) -> None:
    """What cannot be one data set is said before hours are spent on it."""
    sizes = {(f.measures["height"], f.measures["width"]) for f in findings}
    if not config.size and len(sizes) > 1:
        raise ValueError(f"all frames must have one size but have {sorted(sizes)}; choose size=<pixels>")
    if len(rates) > 1:
        raise ValueError(f"all data sets must have one frame rate but have {sorted(rates)}; curate them apart")
    if not config.relabel and len(conventions := {f.convention for f in findings}) > 1:
        raise ValueError(f"all actions must have one convention but have {sorted(conventions)}; choose relabel=true")
    dims = {f.action_dim for f in findings if f.action_dim}
    if not config.relabel and len(dims) > 1:
        raise ValueError(f"all actions must have as many dimensions but have {sorted(dims)}; curate robots apart")
    kinds: dict[str, set[str]] = {}
    for name, kind in (pair for found in findings for pair in found.label_kinds.items()):
        kinds.setdefault(name, set()).add(kind)
    for name in set.intersection(*(set(found.labels) for found in findings)) & kinds.keys():
        if len(kinds[name]) > 1:
            raise ValueError(f"label {name} must be of one kind but is {sorted(kinds[name])}; curate the sets apart")
    if config.encoding == "compact" and not config.size and any(side % 2 for size in sizes for side in size):
        raise ValueError(f"encoding=compact needs even sides but they are {sorted(sizes)}; choose size=<pixels>")
    if len({f.has_state for f in findings}) > 1:
        raise ValueError("all episodes or none must have proprioception; curate those without it apart")
    if config.relabel and not findings[0].has_state:
        raise ValueError("relabel=true needs proprioception, which these episodes lack")


def _curated(kept: Sequence[tuple[Item, str]], labels: Sequence[str], config: CurateConfig, k: int) -> Episode:
    """The kept episode k, as it goes into the data set."""
    item, examined = kept[k]
    episode = read_item(item)
    if episode.episode_id != examined:
        raise DataError(
            f"{item.data}[{item.index}] must be {examined}, as when it was examined, got {episode.episode_id}; "
            "leave the data as they are while they are curated, and choose another out"
        )
    episode = replace(
        episode,
        labels={name: episode.labels[name] for name in labels},
        instruction=normalise_instruction(episode.instruction) if config.normalise else episode.instruction,
        meta={"source": Path(item.data).name},
        episode_id=f"{Path(item.data).name}/{episode.episode_id}",
    )
    if config.relabel:
        episode = episode.relabelled()
    if config.success_by:
        episode.labels["success_probability"] = _success_probability(config.success_by, episode)
    return episode.resized(config.size, config.size) if config.size else episode


def _success_probability(checkpoint: str, episode: Episode) -> np.ndarray:
    """What the success head of a checkpoint says of an episode, (T + 1,) float32."""
    from wfm_core.curation.examine_video import one_thread
    from worldsim.judging import success_probability

    sim, nobody_knows = _judge_of(checkpoint), np.full(len(episode.frames), np.nan, np.float32)
    if episode.agent_pos is None:
        return nobody_knows
    try:
        sim.heads.instruction_id(episode.instruction)
    except ValueError:
        return nobody_knows
    frames = resize_frames(episode.frames, *sim.world_model.frame_shape[:2])
    with one_thread():
        return success_probability(sim, frames, episode.agent_pos, episode.actions, episode.instruction)


@lru_cache(maxsize=1)
def _judge_of(checkpoint: str) -> "WorldSim":
    from worldsim.simulator import load_world_sim

    return load_world_sim(checkpoint)


def _write_manifest(
    path: Path,
    items: Sequence[Item],
    findings: Sequence[Findings],
    verdicts: Sequence[Verdict],
    rules: Mapping[str, Rule],
) -> None:
    def place(k: int) -> str:
        """Of an episode, unlike its own name, which others may have in other data sets."""
        return f"{items[k].data}[{items[k].index}]"

    measures = list(dict.fromkeys(name for found in findings for name in found.measures))
    limits = [rules.get(verdict.reason) for verdict in verdicts]
    columns: dict[str, list] = {
        "item": [found.item_id for found in findings],
        "data": [item.data for item in items],
        "index": [item.index for item in items],
        "kept": [not verdict.reason for verdict in verdicts],
        "reason": [verdict.reason for verdict in verdicts],
        "value": [None if math.isnan(verdict.value) else verdict.value for verdict in verdicts],
        "low": [rule.low if rule else None for rule in limits],
        "high": [rule.high if rule else None for rule in limits],
        "kept_instead": [place(v.kept_instead) if v.kept_instead >= 0 else "" for v in verdicts],
        "error": [found.error for found in findings],
    }
    columns |= {name: [found.measures.get(name) for found in findings] for name in measures}
    write_atomic(path, lambda file: pq.write_table(pa.table(columns), file))


def _card(
    config: CurateConfig,
    findings: Sequence[Findings],
    verdicts: Sequence[Verdict],
    rules: Mapping[str, Rule],
    left_out: Mapping[str, Sequence[str]],
) -> str:
    counts = Counter(verdict.reason for verdict in verdicts)
    others = {UNREADABLE: "", NO_ACTIONS: "", DUPLICATE: f"> {config.alike:g}"}
    kept = [found.measures for found, verdict in zip(findings, verdicts, strict=True) if not verdict.reason]
    names = dict.fromkeys(name for measures in kept for name in measures)
    lines = [
        "# Curated data",
        "",
        f"{counts['']} of {len(verdicts)} episodes kept, from {', '.join(config.data)}.",
        "",
        *(f"Left out of {data} are what {', '.join(more)} saw.\n" for data, more in left_out.items() if more),
        *drop_table(counts, rules, others, "episodes"),
        "",
        *range_table({name: [measures[name] for measures in kept if name in measures] for name in names}),
    ]
    lines += ["", "![Histograms of what was kept and dropped](histograms.png)", ""]
    lines += ["Examples of each, from the middle of the episode:", "", "![Kept and dropped episodes](contact.png)", ""]
    return "\n".join(lines)


def _histograms(findings: Sequence[Findings], verdicts: Sequence[Verdict]) -> bytes:
    kept = np.array([not verdict.reason for verdict in verdicts])
    shown = {
        f"{name}, {unit}": np.array([found.measures.get(name, math.nan) for found in findings])
        for name, unit in SHOWN.items()
    }
    return histograms(shown, kept, "episodes")


def _middle_frame(items: Sequence[Item], k: int) -> np.ndarray:
    frames = read_item(items[k]).frames
    return resize_frames(frames[len(frames) // 2][None], *EXAMPLE_SIZE)[0]


register("curate", CurateConfig, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="curate")
def main(config: Any) -> None:
    """Run the console script."""
    launch("curate", config, CurateConfig, run)


if __name__ == "__main__":
    main()
