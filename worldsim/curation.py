"""What curating episodes and curating plain video share: finding out about every item, verdicts, the card's parts."""

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from wfm_core.curation.rules import Rule
from wfm_core.data.files import DataError, write_atomic
from worldsim.processes import run_all

EXAMINED = "examined"  # folder of what was found of each item
REPORT = ("manifest.parquet", "CARD.md", "histograms.png", "contact.png")
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
    examine: Callable[[Any], Any],
    items: Sequence[Any],
    folder: Path,
    *,
    killed: Callable[[Any], Any],
    unit: str,
    workers: int,
    executor: str,
) -> None:
    """Examine what has no findings yet, one file each; those who kill their reader are found out.

    Args:
        examine: findings, a dataclass, of an item; picklable.
        items: all there are; picklable.
        folder: of the findings.
        killed: findings of an item whose reader does not survive it.
        unit: what the items are.
        workers: see `run_all`.
        executor: see `run_all`.

    Raises:
        BrokenProcessPool, OSError: as of `work_through`.
    """
    work_through(
        partial(_examine_and_keep, examine, folder),
        dict(enumerate(items)),
        folder,
        is_done=lambda k: _place(folder, k).exists(),
        give_up=lambda k: _keep(folder, k, killed(items[k])),
        name="examine",
        unit=unit,
        workers=workers,
        executor=executor,
    )
    for leftover in folder.glob(".item-*.tmp"):  # of readers that were killed, now or before
        leftover.unlink()


def work_through(
    work: Callable[[int, Any], None],
    tasks: Mapping[int, Any],
    folder: Path,
    *,
    is_done: Callable[[int], bool],
    give_up: Callable[[int], None],
    name: str,
    unit: str,
    workers: int,
    executor: str,
) -> None:
    """Do what is not yet done; tasks that kill their worker are tried alone, and found out.

    Args:
        work: does task k, with the values of its own, and leaves a trace of it; picklable.
        tasks: values of each, by number; picklable.
        folder: that exists, for marks of what is being worked on.
        is_done: whether the trace of task k is there.
        give_up: leaves the trace of a task that its worker does not survive.
        name: of the work.
        unit: what the tasks are.
        workers: see `run_all`.
        executor: see `run_all`.

    Raises:
        BrokenProcessPool: workers die before they begin.
        OSError: workers leave no trace.
    """
    marked = partial(_mark_and_work, work, folder)

    def missing() -> list[int]:
        return [k for k in tasks if not is_done(k)]

    todo = missing()
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), unit=unit, desc=name, disable=not tasks) as bar:
        while todo:
            try:
                for _ in run_all(marked, ((k, tasks[k]) for k in todo), workers, executor):
                    bar.update()
            except BrokenProcessPool:
                suspects = [k for k in missing() if _mark(folder, k).exists()]
                if not suspects:
                    raise
                for k in suspects:
                    try:
                        list(run_all(marked, [(k, tasks[k])], 1))
                    except BrokenProcessPool:
                        give_up(k)
            if (left := missing()) == todo:
                raise OSError(
                    f"{name}: workers must write to {folder.parent}, but left nothing; do all of them see it?"
                )
            todo = left
            bar.update(len(tasks) - len(todo) - bar.n)
    for leftover in folder.glob(".working-*"):  # of workers that were killed, now or before
        leftover.unlink()


@contextlib.contextmanager
def other_settings_if_refused(out: Path) -> Generator[None]:
    """Where a ValueError says that nothing can be made of these settings, let others be tried in the same folder."""
    try:
        yield
    except ValueError:
        (out / "curate.json").unlink()
        raise


def check_unchanged(folder: Path, data: Sequence[str], listing: str) -> None:
    """Check that data are as when their findings were begun, which are by number.

    Args:
        folder: of the findings, whether there are any or not.
        data: what is curated.
        listing: its fingerprint.

    Raises:
        ValueError: files have come, gone or changed their size since then.
    """
    begun = folder / "examine.json"
    then = json.loads(begun.read_text()) if begun.exists() else {}
    if then.get("data") == list(data) and then.get("listing", listing) != listing:
        raise ValueError(
            f"the files in {', '.join(data)} must be as when {folder} was begun, but some have come, gone or changed "
            "their size; choose another out, or put them back"
        )


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
        f"| {name} | {np.min(each):.3g} | {np.median(each):.3g} | {np.max(each):.3g} |"
        for name, each in values.items()
        if len(each)
    ]


def contact_sheet(verdicts: Sequence[Verdict], show: Callable[[int], np.ndarray]) -> bytes:
    """PNG: a row a reason with up to `EXAMPLES` pictures, the kept ones first; nothing can be shown of the unreadable.

    Args:
        verdicts: of all items.
        show: picture (*EXAMPLE_SIZE, 3) uint8 of item k; its place stays empty where that raises DataError.
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
            with contextlib.suppress(DataError):
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
        low, high = (column[known].min(), column[known].max()) if known.any() else (0.0, 1.0)
        if high - low <= 1e-6 * abs(high):  # values that differ by rounding alone leave no room for bins
            low, high = low - 0.5, high + 0.5
        shown = [column[group & known] for group in groups.values()]
        chart.hist(shown, bins=24, range=(low, high), stacked=True, label=list(groups))
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


def nothing_kept(reasons: Iterable[str], unit: str, out: Path) -> ValueError:
    """What to say when every item was dropped, with a report in `out`."""
    counts = Counter(reasons)
    dropped = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return ValueError(
        f"nothing is kept of {counts.total()} {unit}: {dropped}; {out / 'CARD.md'} and manifest.parquet say why"
    )


def _mark_and_work(work: Callable[[int, Any], None], folder: Path, task: tuple[int, Any]) -> int:
    k, values = task
    _mark(folder, k).touch()
    work(k, values)
    _mark(folder, k).unlink(missing_ok=True)
    return k


def _examine_and_keep(examine: Callable[[Any], Any], folder: Path, k: int, item: Any) -> None:
    _keep(folder, k, examine(item))


def _keep(folder: Path, k: int, findings: Any) -> None:
    write_atomic(_place(folder, k), json.dumps(asdict(findings)).encode())


def _place(folder: Path, k: int) -> Path:
    return folder / f"item-{k:07d}.json"


def _mark(folder: Path, k: int) -> Path:
    """There while somebody works on a task, and after that has killed him."""
    return folder / f".working-{k:07d}"
