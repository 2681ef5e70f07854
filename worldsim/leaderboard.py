"""From episode records to the ranking, as plain JSON: success rates, differences, agreement of the two worlds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from worldsim.evaluate import EpisodeRecord, Pair
from worldsim.ranking import Estimate, agreement, paired_difference, wilson_interval

IMAGINED, TWIN = "imagined", "twin"
"""The names of the two worlds."""


def outcomes(
    records: Sequence[EpisodeRecord], world: str, policies: Sequence[str], tasks: Sequence[str], pairs: Sequence[Pair]
) -> np.ndarray:
    """Arrange successes as an array.

    Args:
        records: episodes, of any worlds and in any order.
        world: which world's.
        policies: names of the P policies.
        tasks: names of the T tasks.
        pairs: the E (initial state, seed) pairs.

    Returns:
        (P, T, E) bool.

    Raises:
        ValueError: an episode is missing; names it.
    """
    found = {(r.policy, r.task, *r.pair): r.success for r in records if r.world == world}
    table = np.zeros((len(policies), len(tasks), len(pairs)), dtype=bool)
    for p, policy in enumerate(policies):
        for t, task in enumerate(tasks):
            for e, pair in enumerate(pairs):
                if (policy, task, *pair) not in found:
                    raise ValueError(
                        f"every requested episode must be there, got none of policy {policy!r} on task {task!r} from "
                        f"initial state {pair[0]}, seed {pair[1]} in the {world} world"
                    )
                table[p, t, e] = found[policy, task, *pair]
    return table


def rank_policies(
    records: Sequence[EpisodeRecord],
    policies: Mapping[str, str],
    tasks: Sequence[str],
    pairs: Sequence[Pair],
    *,
    twin: bool,
    seed: int = 0,
) -> dict[str, Any]:
    """Rank policies by imagined success.

    Args:
        records: the episodes of all cells; others are ignored.
        policies: name -> content hash.
        tasks: task names.
        pairs: the (initial state, seed) pairs every policy was run on.
        twin: whether the records hold the twin's episodes too.
        seed: of the bootstrap.

    Returns:
        A JSON-ready dict: `tasks`, `num_episodes`, `policies` (best imagined first; each with success rates, their
        intervals, the gap between the worlds, the difference to the first), `agreement` (None without twin) and
        `notes`.

    Raises:
        ValueError: an episode is missing.
    """
    rng = np.random.default_rng(seed)
    worlds = (IMAGINED, TWIN) if twin else (IMAGINED,)
    names = list(policies)
    tables = {world: outcomes(records, world, names, tasks, pairs) for world in worlds}
    rates = {world: table.mean((1, 2)) for world, table in tables.items()}
    # Ties in imagination keep the order of the request; nothing of the twin may leak into the ranking.
    order = sorted(range(len(names)), key=lambda p: -rates[IMAGINED][p])
    wanted = [r for r in records if r.task in tasks and r.pair in set(pairs)]
    rows = []
    for p in order:
        row: dict[str, Any] = {"name": names[p], "hash": policies[names[p]]}
        for world, table in tables.items():
            leader = int(np.argmax(rates[world]))
            row[world] = {
                "rank": 1 + int((rates[world] > rates[world][p]).sum()),
                **success_rate(int(table[p].sum()), table[p].size),
                "to_first": jsonable(paired_difference(table[p], table[leader], rng=rng)) if p != leader else None,
                **_behaviour([r for r in wanted if r.policy == names[p] and r.world == world]),
                "tasks": {task: success_rate(int(table[p, t].sum()), len(pairs)) for t, task in enumerate(tasks)},
            }
        if twin:
            row["gap"] = jsonable(paired_difference(tables[IMAGINED][p], tables[TWIN][p], rng=rng))
        rows.append(row)
    result: dict[str, Any] = {
        "tasks": list(tasks),
        "num_episodes": len(pairs),
        "pairs": [list(pair) for pair in pairs],
        "policies": rows,
        "agreement": None,
        "episodes": None,
        "notes": _notes(pairs),
    }
    if twin:
        scores = agreement(real=tables[TWIN], imagined=tables[IMAGINED], rng=rng)
        result["agreement"] = {
            "policies": {name: jsonable(estimate) for name, estimate in scores.policies.items()},
            "cells": {name: jsonable(estimate) for name, estimate in scores.cells.items()},
            "notes": list(scores.notes),
        }
        result["episodes"] = confusion(predicted=tables[IMAGINED].ravel(), truth=tables[TWIN].ravel())
    return result


def success_rate(successes: int, trials: int) -> dict[str, Any]:
    """Return a success rate with its Wilson interval."""
    low, high = wilson_interval(successes, trials)
    return {
        "success": successes / trials if trials else None,
        "interval": [low, high],
        "successes": successes,
        "episodes": trials,
    }


def confusion(*, predicted: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Return the confusion matrix of (N,) bool predictions, with the accuracy and its Wilson interval."""
    hits = success_rate(int((predicted == truth).sum()), len(truth))
    return {
        "true_positive": int((predicted & truth).sum()),
        "false_positive": int((predicted & ~truth).sum()),
        "false_negative": int((~predicted & truth).sum()),
        "true_negative": int((~predicted & ~truth).sum()),
        "accuracy": hits["success"],
        "interval": hits["interval"],
    }


def jsonable(estimate: Estimate) -> dict[str, Any]:
    """Turn an estimate into JSON: value, interval and p-value, None where undefined."""
    value, low, high = (None if math.isnan(x) else x for x in (estimate.value, estimate.low, estimate.high))
    return {
        "value": value,
        "interval": [low, high],
        "p_value": None if estimate.p_value is None or math.isnan(estimate.p_value) else estimate.p_value,
    }


def as_text(ranking: dict[str, Any]) -> str:
    """Return the ranking as an aligned table for a terminal, with the agreement figures below it."""
    twin = ranking["agreement"] is not None
    header = ["", "policy", "imagined"] + (["true", "gap"] if twin else [])
    rows = []
    for policy in ranking["policies"]:
        row = [str(policy[IMAGINED]["rank"]), policy["name"], _percent(policy[IMAGINED])]
        if twin:
            row += [_percent(policy[TWIN]), f"{100 * policy['gap']['value']:+.0f}"]
        rows.append(row)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        left = [row[i].ljust(width) if i == 1 else row[i].rjust(width) for i, width in enumerate(widths)]
        lines.append("  ".join(left).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    if twin:
        lines.append("")
        for name, label in (("pearson", "Pearson r"), ("mmrv", "MMRV"), ("top1_regret", "top-1 regret")):
            estimate = ranking["agreement"]["policies"][name]
            lines.append(f"{label:<14}{_figure(estimate)}  over {len(rows)} policies")
        cells = len(rows) * len(ranking["tasks"])
        lines.append(f"{'Pearson r':<14}{_figure(ranking['agreement']['cells']['pearson'])}  over {cells} cells")
    notes = [*ranking["notes"], *(ranking["agreement"]["notes"] if twin else [])]
    lines += [f"Note: {note}" for note in notes]
    return "\n".join(lines)


def _notes(pairs: Sequence[Pair]) -> list[str]:
    uses = len(pairs) / len({state for state, _ in pairs})
    if uses == 1:
        return []
    return [
        f"Each initial state is used {uses:.1f} times on average: policies that draw nothing at random repeat "
        "themselves there, and intervals that take the episodes as independent are too narrow."
    ]


def _percent(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{100 * rate['success']:.0f}% [{100 * low:2.0f} to {100 * high:3.0f}]"


def _figure(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "undefined"
    low, high = estimate["interval"]
    return f"{estimate['value']:6.3f} [{low:.3f}, {high:.3f}]"


def _behaviour(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    reasons = [record.end_reason for record in records]
    rows = [asdict(record) for record in records]
    return {
        "mean_return": float(np.mean([row["episode_return"] for row in rows])),
        "mean_length": float(np.mean([row["length"] for row in rows])),
        "end_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }
