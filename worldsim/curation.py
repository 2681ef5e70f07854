"""What curating episodes and curating plain video share: finding out about every item, verdicts, the card's parts."""

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from wfm_core.curation.rules import Rule
from wfm_core.data.files import write_atomic
from worldsim.processes import run_all

EXAMINED = "examined"  # folder of what was found of each item
UNREADABLE, DUPLICATE = "unreadable", "duplicate"
KILLED = "its reader was killed: out of memory, or a broken library"
EXAMPLES, EXAMPLE_SIZE = 6, (96, 128)  # of each reason on the contact sheet, and their height and width


@dataclass(frozen=True)
class Verdict:
    """Why an item was dropped: `reason` "" if it was not; the measured value, and which item is kept instead."""

    reason: str = ""
    value: float = math.nan
    kept_instead: int = -1


def examine_all(
    examine: Callable[[int], Any],
    count: int,
    folder: Path,
    *,
    killed: Callable[[int], Any],
    unit: str,
    workers: int,
    executor: str,
) -> None:
    """Examine what has no findings yet, one file each; those who kill their reader are tried alone, and found out.

    Args:
        examine: findings, a dataclass, of item k; picklable.
        count: of items.
        folder: of the findings.
        killed: findings of an item whose reader does not survive it.
        unit: what the items are.
        workers: see `run_all`.
        executor: see `run_all`.

    Raises:
        BrokenProcessPool: workers die before they begin.
    """
    stage = partial(_examine_and_keep, examine, folder)

    def missing() -> list[int]:
        return [k for k in range(count) if not _place(folder, k).exists()]

    todo = missing()
    with tqdm(total=count, initial=count - len(todo), unit=unit, desc="examine") as bar:
        while todo:
            try:
                for _ in run_all(stage, todo, workers, executor):
                    bar.update()
            except BrokenProcessPool:
                suspects = [k for k in missing() if _mark(folder, k).exists()]
                if not suspects:
                    raise
                for k in suspects:
                    try:
                        list(run_all(stage, [k], 1))
                    except BrokenProcessPool:
                        _keep(folder, k, killed(k))
            todo = missing()
            bar.update(count - len(todo) - bar.n)
    # Of readers that were killed, now or before.
    for leftover in [*folder.glob(".reading-*"), *folder.glob(".item-*.tmp")]:
        leftover.unlink()


def read_findings(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """What `examine_all` found, item by item."""
    for k in range(count):
        yield json.loads(_place(folder, k).read_text())


def drop_table(counts: Counter[str], rules: Mapping[str, Rule], others: Mapping[str, str], unit: str) -> list[str]:
    """Lines of a Markdown table: how many were dropped for which reason.

    Args:
        counts: by reason.
        rules: by their name, which is a reason.
        others: reasons that are no rules, and within what is kept.
        unit: what the items are.
    """
    lines = [f"| dropped | {unit} | measured | kept within |", "|---|---|---|---|"]
    kept_within = {name: f"[{rule.low:g}, {rule.high:g}]" for name, rule in rules.items()} | dict(others)
    for reason, within in kept_within.items():
        if counts[reason]:
            measure = rules[reason].measure if reason in rules else ""
            lines.append(f"| {reason} | {counts[reason]} | {measure} | {within} |")
    return lines


def range_table(values: Mapping[str, Sequence[float] | np.ndarray]) -> list[str]:
    """Lines of a Markdown table: least, median and most of each measure of what is kept."""
    lines = ["| measure of the kept | least | median | most |", "|---|---|---|---|"]
    return lines + [
        f"| {name} | {np.min(each):.3g} | {np.median(each):.3g} | {np.max(each):.3g} |" for name, each in values.items()
    ]


def contact_sheet(verdicts: Sequence[Verdict], show: Callable[[int], np.ndarray]) -> bytes:
    """PNG: a row a reason with up to `EXAMPLES` pictures, the kept ones first; nothing can be shown of the unreadable.

    Args:
        verdicts: of all items.
        show: picture (*EXAMPLE_SIZE, 3) uint8 of item k.
    """
    height, width = EXAMPLE_SIZE
    chosen: dict[str, list[int]] = {"": []}
    for k, verdict in enumerate(verdicts):
        if verdict.reason != UNREADABLE and len(row := chosen.setdefault(verdict.reason, [])) < EXAMPLES:
            row.append(k)
    rows = []
    for reason, items in sorted(chosen.items()):
        row = np.full((height + 16, EXAMPLES * width, 3), 255, np.uint8)
        cv2.putText(row, reason or "kept", (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        for place, k in enumerate(items):
            row[16:, place * width : (place + 1) * width] = show(k)
        rows.append(row)
    return as_png(np.concatenate(rows))


def histograms(
    values: Mapping[str, np.ndarray], kept: np.ndarray, unit: str, tags: Mapping[str, Sequence[str]] | None = None
) -> bytes:
    """PNG: how measures are distributed over what is kept and what is dropped.

    Args:
        values: label -> (N,) float of all items; NaN where it is not known.
        kept: (N,) bool.
        unit: what the items are.
        tags: label -> N tags, joined by blanks, which are counted.
    """
    from matplotlib.figure import Figure

    groups = {"kept": kept, "dropped": ~kept}
    rows = -(-(len(values) + len(tags or {})) // 3)
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    charts = figure.subplots(rows, 3, squeeze=False).ravel()
    for chart, (label, column) in zip(charts, values.items(), strict=False):
        known = np.isfinite(column)
        chart.hist([column[group & known] for group in groups.values()], bins=24, stacked=True, label=list(groups))
        chart.set(xlabel=label, ylabel=unit)
    for chart, (label, joined) in zip(charts[len(values) :], (tags or {}).items(), strict=False):
        names = sorted({tag for each in joined for tag in each.split()})
        bottom = np.zeros(len(names))
        for name, group in groups.items():
            found = Counter(tag for k in np.flatnonzero(group) for tag in joined[k].split())
            chart.bar(names, heights := np.array([found[tag] for tag in names]), bottom=bottom, label=name)
            bottom += heights
        chart.set(xlabel=label, ylabel=unit)
        chart.tick_params(axis="x", rotation=30)
    charts[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def as_png(picture: np.ndarray) -> bytes:
    """PNG of a picture (H, W, 3) uint8."""
    done, png = cv2.imencode(".png", picture[..., ::-1])
    assert done
    return png.tobytes()


def nothing_kept(reasons: Iterable[str], unit: str) -> ValueError:
    """What to say when every item was dropped."""
    counts = Counter(reasons)
    dropped = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return ValueError(f"nothing is kept of {counts.total()} {unit}: {dropped}")


def _examine_and_keep(examine: Callable[[int], Any], folder: Path, k: int) -> int:
    _mark(folder, k).touch()
    _keep(folder, k, examine(k))
    return k


def _keep(folder: Path, k: int, findings: Any) -> None:
    write_atomic(_place(folder, k), json.dumps(asdict(findings)).encode())
    _mark(folder, k).unlink(missing_ok=True)


def _place(folder: Path, k: int) -> Path:
    return folder / f"item-{k:07d}.json"


def _mark(folder: Path, k: int) -> Path:
    """There while somebody reads the item, and after that has killed him."""
    return folder / f".reading-{k:07d}"
