"""The report: one HTML file that opens offline, with charts and videos inside."""

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from wfm_core.data.actions import CONTROL_HZ
from wfm_core.data.files import write_atomic
from worldsim.charts import IMAGINED_CLASS, TRUE_CLASS, Point, forest, scatter
from worldsim.clips import PLAYBACK_FPS, Clip, choose_clips
from worldsim.evaluate import EpisodeRecord
from worldsim.leaderboard import IMAGINED, TWIN
from worldsim.store import EpisodeStore

STATISTICS: dict[str, tuple[str, str]] = {
    "pearson": ("Pearson r", "do the success rates lie on a line? 1 is perfect, 0 is chance"),
    "spearman": ("Spearman ρ", "the same for the ranks"),
    "kendall": ("Kendall τ-b", "share of pairs in the right order minus share in the wrong one"),
    "mmrv": (
        "MMRV",
        "mean maximum rank violation: the largest true gap misordered, averaged over policies; 0 is perfect",
    ),
    "top1_regret": ("Top-1 regret", "true success lost by deploying the policy imagined best (the worst one of a tie)"),
    "bias": ("Bias", "imagined minus true success; above 0 imagination flatters"),
    "mean_absolute_error": ("Mean error", "average distance between imagined and true success"),
}
"""Statistic -> its label and what it says."""

_RATES = ("mmrv", "top1_regret", "bias", "mean_absolute_error")  # shown in success-rate points, not as coefficients


def write_report(ranking: dict[str, Any], records: Sequence[EpisodeRecord], store: EpisodeStore, path: Path) -> None:
    """Write the report.

    Args:
        ranking: as `contest.hold_contest` makes it, with "world_model" and "provenance".
        records: the episodes it rests on.
        store: holds their videos.
        path: where to.

    Raises:
        OSError: it could not be written.
        ValueError: a kept video is damaged; names it.
    """
    names = {policy["name"] for policy in ranking["policies"]}
    clips = choose_clips([record for record in records if record.policy in names], store)
    write_atomic(path, render(ranking, clips).encode())


def render(ranking: dict[str, Any], clips: dict[str, list[Clip]]) -> str:
    """Return the report's HTML.

    Args:
        ranking: as for `write_report`.
        clips: category -> videos.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "range": _range, "points": _points, "signed": _signed}
    environment.filters |= {"task": lambda name: name.replace("_", " ")}
    template = environment.from_string(resources.files("worldsim").joinpath("report.html.j2").read_text())
    twin = ranking["agreement"] is not None
    return template.render(
        ranking=ranking,
        twin=twin,
        verdict=_verdict(ranking),
        forests={policy["name"]: _forest(policy, twin) for policy in ranking["policies"]},
        scatter=Markup(_scatter(ranking)) if twin else "",
        statistics=_statistics(ranking) if twin else [],
        videos=[(title, [_video(clip) for clip in chosen]) for title, chosen in clips.items()],
        speed=PLAYBACK_FPS / CONTROL_HZ,
    )


def _verdict(ranking: dict[str, Any]) -> dict[str, Any]:
    """Say in words which policy to deploy and how sure that is."""
    policies = ranking["policies"]
    first = policies[0]
    tied = [policy for policy in policies if policy[IMAGINED]["rank"] == 1]
    # A policy is not told apart from the first while the interval of their difference reaches 0.
    rivals = [p for p in policies[1:] if p[IMAGINED]["to_first"]["interval"][1] >= 0]
    verdict = {"first": first, "tied": len(tied), "rivals": [policy["name"] for policy in rivals]}
    if TWIN in first:
        best = max(policies, key=lambda policy: policy[TWIN]["success"])
        verdict["best"] = best
        verdict["regret"] = best[TWIN]["success"] - first[TWIN]["success"]
        tied_true = [policy[TWIN]["success"] for policy in tied]
        verdict["tied_true"] = min(tied_true), max(tied_true)
    return verdict


def _forest(policy: dict[str, Any], twin: bool) -> Markup:
    rows = [(IMAGINED_CLASS, policy[IMAGINED]["success"], policy[IMAGINED]["interval"])]
    if twin:
        rows.append((TRUE_CLASS, policy[TWIN]["success"], policy[TWIN]["interval"]))
    return Markup(forest(rows))


def _scatter(ranking: dict[str, Any]) -> str:
    policies, cells = [], []
    for policy in ranking["policies"]:
        imagined, true = policy[IMAGINED], policy[TWIN]
        point = Point(policy["name"], imagined["success"], true["success"], imagined["interval"], true["interval"])
        policies.append(point)
        for task in ranking["tasks"]:
            rates = imagined["tasks"][task]["success"], true["tasks"][task]["success"]
            cells.append(Point(f"{policy['name']}, {task.replace('_', ' ')}", *rates))
    return scatter(policies, cells)


def _statistics(ranking: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, (label, meaning) in STATISTICS.items():
        row: dict[str, Any] = {"label": label, "meaning": meaning, "name": name}
        for level in ("policies", "cells"):
            estimate = ranking["agreement"][level].get(name)
            row[level] = None if estimate is None else _formatted(estimate, name in _RATES, signed=name == "bias")
        rows.append(row)
    return rows


def _formatted(estimate: dict[str, Any], as_points: bool, *, signed: bool = False) -> dict[str, str]:
    if estimate["value"] is None:
        return {"value": "undefined", "interval": "", "p": ""}

    def number(value: float) -> str:
        text = f"{100 * value:+.1f}" if as_points and signed else f"{100 * value:.1f}" if as_points else f"{value:.2f}"
        return text.replace("-", "\N{MINUS SIGN}")

    p_value = estimate["p_value"]
    p = (
        ""
        if p_value is None
        else "p < 0.001"
        if p_value < 0.001
        else f"p = {p_value:.3f}"
        if p_value < 0.1
        else f"p = {p_value:.2f}"
    )
    low, high = estimate["interval"]
    return {
        "value": number(estimate["value"]) + (" pt" if as_points else ""),
        "interval": f"{number(low)} to {number(high)}",
        "p": p,
    }


def _video(clip: Clip) -> dict[str, Any]:
    return {
        "source": "data:video/mp4;base64," + base64.b64encode(clip.mp4).decode(),
        "policy": clip.imagined.policy,
        "task": clip.imagined.task,
        "initial_state": clip.imagined.initial_state,
        "imagined": _outcome(clip.imagined),
        "true": _outcome(clip.true) if clip.true else None,
    }


def _outcome(record: EpisodeRecord) -> str:
    seconds = record.length / CONTROL_HZ
    reasons = {
        "success": f"solved, {seconds:.1f} s",
        "failure": f"failed, {seconds:.1f} s",
        "horizon": "not solved",
        "uncertainty": "too uncertain",
    }
    return reasons.get(record.end_reason, record.end_reason)


def _percent(rate: float | None) -> str:
    return "\N{EM DASH}" if rate is None else f"{100 * rate:.0f}%"


def _range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.0f}\N{EN DASH}{100 * interval[1]:.0f}"


def _points(value: float) -> str:
    return f"{100 * value:.0f} point" + ("" if round(100 * value) == 1 else "s")


def _signed(value: float) -> str:
    return "0" if round(100 * value) == 0 else f"{100 * value:+.0f}".replace("-", "\N{MINUS SIGN}")
