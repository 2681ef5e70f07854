"""Curate robot data: keep the episodes that are worth training on, and account for every other one.

    worldsim-curate 'data=[path/to/bridge,path/to/mine]' out=runs/curated size=128
    worldsim-curate 'data=[runs/demos]' out=runs/strict '+rules={gripper_never_moves: {low: 0.5}, frozen: {high: 0.2}}'

Data sets of any known format (see worldsim-convert --help) become one LeRobotDataset v3.0. Dropped is what cannot be
read, what breaks a rule (too short, dark, frozen, cut, shaky, idle, teleports, actions that fit neither frames nor
states, ...), and of episodes that are there twice, at whatever size and encoding, all but the largest. Beside the data
set `out` holds manifest.parquet, in which every episode is found with all that was measured of it, and by what and at
which value it was dropped; and CARD.md with contact.png, examples of each. A file that kills its reader costs one
episode, if there are workers. Interrupt it and start it again with the same settings: it goes on where it stopped.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from wfm_core.curation.duplicates import ALIKE, difference, duplicates
from wfm_core.curation.examine import Findings, Item, count_items, examine, read_item
from wfm_core.curation.rules import Rule, broken_rule, changed_rules
from wfm_core.data.episode import UNKNOWN_ACTIONS, Episode
from wfm_core.data.files import write_atomic
from wfm_core.data.video import ENCODINGS, resize_frames
from worldsim.commands.entry import launch, register
from worldsim.processes import run_all
from worldsim.recording import check_new, claimed, deciding, make_dataset

UNREADABLE, NO_ACTIONS, DUPLICATE = "unreadable", "no_actions", "duplicate"
EXAMINED = "examined"  # folder of what was found of each episode
EXAMPLES, EXAMPLE_SIZE = 6, (96, 128)  # of each reason on the contact sheet, and their height and width


@dataclass
class CurateConfig:
    """What to curate.

    Attributes:
        data: folders of data sets.
        out: folder of the new one.
        options: of the formats' readers.
        rules: other limits than `wfm_core.curation.rules.RULES`, as {dark: {high: 0.5}}.
        alike: share of a fingerprint's cells that may differ in episodes that are the same one; below 0 keeps all.
        size: height and width of the frames, whatever their aspect was; 0 leaves them as they are.
        relabel: replace actions by what was reached.
        encoding: "lossless" (pixels as they were decoded) or "compact" (yuv420p, plays everywhere).
        workers: processes; 0 does everything in this one. Does not change what comes out.
    """

    data: list[str] = field(default_factory=list)
    out: str = "runs/curated"
    options: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    alike: float = ALIKE
    size: int = 0
    relabel: bool = False
    encoding: str = "lossless"
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must be folders of data sets, got none; say 'data=[<folder>]'")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be among {', '.join(ENCODINGS)}, got {self.encoding}")
        for name in ("size", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        changed_rules(self.rules)


@dataclass(frozen=True)
class Verdict:
    """Why an item was dropped: `reason` "" if it was not; the measured value, and which item is kept instead."""

    reason: str = ""
    value: float = math.nan
    kept_instead: int = -1


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
        ValueError: no data set, nothing that is kept, episodes that do not go together, or `out` holds something else.
        OSError: the disk is full; what is done so far is kept.
    """
    out, options = Path(config.out), json.dumps(config.options)
    items = [Item(data, options, k) for data in config.data for k in range(count_items(data, options))]
    rules = changed_rules(config.rules)
    resolved = {"rules": {name: asdict(rule) for name, rule in rules.items()}, "num_episodes": len(items)}
    settings = deciding(config) | resolved
    own: dict[str, Any] = {"command": "curate", "settings": settings, "defaults": asdict(CurateConfig(config.data))}
    if not (out / "curate.json").exists():
        check_new(out, "curate", keep=(EXAMINED,))
    # What was found of the episodes serves other settings, too, as long as nothing is made of it.
    seen = {name: settings[name] for name in ("data", "options", "num_episodes")}
    with claimed(out / EXAMINED, "examine", seen, {}):
        findings = _examine_all(items, out / EXAMINED, config.workers)
    verdicts = judge(findings, rules, config.alike)
    kept = [k for k, verdict in enumerate(verdicts) if not verdict.reason]
    if not kept:
        counts = Counter(verdict.reason for verdict in verdicts).most_common()
        raise ValueError(f"nothing is kept of {len(items)} episodes: {', '.join(f'{n} {name}' for name, n in counts)}")
    _check_alike(config, [findings[k] for k in kept])
    with claimed(out, **own, keep=(EXAMINED,)):
        _write_manifest(out / "manifest.parquet", items, findings, verdicts, rules)
        write_atomic(out / "CARD.md", _card(config, findings, verdicts, rules).encode())
        write_atomic(out / "contact.png", _contact_sheet(items, verdicts))
    labels = sorted(set.intersection(*(set(findings[k].labels) for k in kept)))
    make_episode = partial(_curated, [items[k] for k in kept], labels, config.size, config.relabel)
    make_dataset(out, make_episode, len(kept), encoding=config.encoding, workers=config.workers, **own)
    print(f"{len(kept)} of {len(items)} episodes kept in {out.resolve()}; {out / 'CARD.md'} says what was dropped")


def _examine_all(items: Sequence[Item], folder: Path, workers: int) -> list[Findings]:
    """Examine what has no findings yet; those who kill their reader are found out one by one."""
    places = [folder / f"item-{k:07d}.json" for k in range(len(items))]
    stage = partial(_examine_and_keep, list(items), folder)

    def missing() -> list[int]:
        return [k for k, place in enumerate(places) if not place.exists()]

    with tqdm(total=len(items), initial=len(items) - len(missing()), unit="episode", desc="examine") as bar:
        try:
            for _ in run_all(stage, missing(), workers):
                bar.update()
        except BrokenProcessPool:
            for k in missing():
                try:
                    list(run_all(stage, [k], 1))
                except BrokenProcessPool:
                    name = f"{Path(items[k].data).name}[{items[k].index}]"
                    _keep(places[k], Findings(name, error="its reader was killed: out of memory, or a broken library"))
                bar.update()
    return [Findings(**json.loads(place.read_text())) for place in places]


def _examine_and_keep(items: Sequence[Item], folder: Path, k: int) -> int:
    _keep(folder / f"item-{k:07d}.json", examine(items[k]))
    return k


def _keep(place: Path, findings: Findings) -> None:
    write_atomic(place, json.dumps(asdict(findings)).encode())


def _check_alike(config: CurateConfig, findings: Sequence[Findings]) -> None:
    """What cannot be one data set is said before hours are spent on it."""
    sizes = {(f.measures["height"], f.measures["width"]) for f in findings}
    if not config.size and len(sizes) > 1:
        raise ValueError(f"all frames must have one size but have {sorted(sizes)}; choose size=<pixels>")
    if not config.relabel and len(conventions := {f.convention for f in findings}) > 1:
        raise ValueError(f"all actions must have one convention but have {sorted(conventions)}; choose relabel=true")
    if len({f.has_state for f in findings}) > 1:
        raise ValueError("all episodes or none must have proprioception; curate those without it apart")
    if config.relabel and not findings[0].has_state:
        raise ValueError("relabel=true needs proprioception, which these episodes lack")


def _curated(items: Sequence[Item], labels: Sequence[str], size: int, relabelled: bool, k: int) -> Episode:
    """The kept episode k, as it goes into the data set."""
    episode = read_item(items[k])
    episode = replace(
        episode,
        labels={name: episode.labels[name] for name in labels},
        meta={"source": Path(items[k].data).name},
        episode_id=f"{Path(items[k].data).name}/{episode.episode_id}",
    )
    if relabelled:
        episode = episode.relabelled()
    return episode.resized(size, size) if size else episode


def _write_manifest(
    path: Path,
    items: Sequence[Item],
    findings: Sequence[Findings],
    verdicts: Sequence[Verdict],
    rules: Mapping[str, Rule],
) -> None:
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
        "kept_instead": [findings[v.kept_instead].item_id if v.kept_instead >= 0 else "" for v in verdicts],
        "error": [found.error for found in findings],
    }
    columns |= {name: [found.measures.get(name) for found in findings] for name in measures}
    write_atomic(path, lambda file: pq.write_table(pa.table(columns), file))


def _card(
    config: CurateConfig, findings: Sequence[Findings], verdicts: Sequence[Verdict], rules: Mapping[str, Rule]
) -> str:
    counts = Counter(verdict.reason for verdict in verdicts)
    lines = [
        "# Curated data",
        "",
        f"{counts['']} of {len(verdicts)} episodes kept, from {', '.join(config.data)}.",
        "",
        "| dropped | episodes | measured | kept within |",
        "|---|---|---|---|",
    ]
    for reason in [*rules, UNREADABLE, NO_ACTIONS, DUPLICATE]:
        if counts[reason]:
            rule = rules.get(reason)
            within = f"[{rule.low:g}, {rule.high:g}]" if rule else f"> {config.alike:g}" if reason == DUPLICATE else ""
            lines.append(f"| {reason} | {counts[reason]} | {rule.measure if rule else ''} | {within} |")
    lines += ["", "| measure of the kept | least | median | most |", "|---|---|---|---|"]
    kept = [found.measures for found, verdict in zip(findings, verdicts, strict=True) if not verdict.reason]
    for name in dict.fromkeys(name for measures in kept for name in measures):
        values = [measures[name] for measures in kept if name in measures]
        lines.append(f"| {name} | {min(values):.3g} | {np.median(values):.3g} | {max(values):.3g} |")
    return "\n".join([*lines, "", "Examples of each, from the middle of the episode: contact.png", ""])


def _contact_sheet(items: Sequence[Item], verdicts: Sequence[Verdict]) -> bytes:
    """PNG: a row a reason with up to `EXAMPLES` middle frames, the kept ones first."""
    height, width = EXAMPLE_SIZE
    rows = []
    for reason in dict.fromkeys(["", *sorted({verdict.reason for verdict in verdicts} - {UNREADABLE})]):
        chosen = [k for k, verdict in enumerate(verdicts) if verdict.reason == reason][:EXAMPLES]
        row = np.full((height + 16, EXAMPLES * width, 3), 255, np.uint8)
        cv2.putText(row, reason or "kept", (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        for place, k in enumerate(chosen):
            frames = read_item(items[k]).frames
            row[16:, place * width : (place + 1) * width] = resize_frames(
                frames[len(frames) // 2][None], height, width
            )[0]
        rows.append(row)
    done, png = cv2.imencode(".png", np.concatenate(rows)[..., ::-1])
    assert done
    return png.tobytes()


register("curate", CurateConfig, __doc__)


@hydra.main(version_base=None, config_path="conf", config_name="curate")
def main(config: Any) -> None:
    """Run the console script."""
    launch("curate", config, CurateConfig, run)


if __name__ == "__main__":
    main()
