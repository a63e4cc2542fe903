"""Plots of answers: against the budget, and against the time of a step with the same settings.

Answers come from the results.json of ``quest-compile eval``, times from ``bench``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quest_compile.bench.report.names import KINDS, tokens
from quest_compile.bench.report.plots import draw
from quest_compile.bench.report.tables import select, values_of, whole
from quest_compile.bench.results import Result
from quest_compile.choices import NO_FORCED_PAGES

Row = dict[str, Any]


def load_answers(path: Path) -> list[Row]:
    """The rows of a results.json whose scores are shares of right answers.

    Raises:
        ValueError: it is no such file, or has no such rows.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results.json of quest-compile eval: {error}") from error
    answers = [row for row in rows if row["kind"] == "answer"]
    if not answers:
        raise ValueError(f"{path} has no rows of right answers")
    return answers


def write_accuracy_plots(rows: Sequence[Row], results: Sequence[Result], folder: Path) -> list[str]:
    """Returns the names of the SVG files."""
    written = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        own = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        title = f"{task}, {tokens(length)} tokens"
        name = f"accuracy_{task}_{length}"
        if draw(lambda axes, own=own: _against_budget(axes, own), title, folder / name):
            written.append(f"{name}.svg")
        for dtype in values_of(whole(results), "dtype"):
            here = select(whole(results), dtype=dtype)
            name = f"accuracy_time_{task}_{length}_{dtype}"
            subject = f"{title}, against the time of {here[0].metadata['shape']}, {dtype}"
            if draw(
                lambda axes, own=own, here=here: _against_time(axes, own, here),
                subject,
                folder / name,
            ):
                written.append(f"{name}.svg")
    return written


def kind_of(row: Row) -> str | None:
    """The settings of a row of Quest by their name in ``bench``; None where others are set.

    Sinks and recent pages may differ from those that were timed: they cost the same.
    """
    kind, _, settings = row["method"].partition(":")
    values = dict(part.split("=") for part in settings.split(",") if part)
    for name in NO_FORCED_PAGES:
        values.pop(name, None)
    for name, options in KINDS.items():
        if kind == "quest" and values == {k: str(v) for k, v in options.items()}:
            return name
    return None


def _dense(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["method"] == "dense"), None)


def _against_budget(axes: Any, rows: Sequence[Row]) -> bool:
    """Right answers by budget, with 95 % bands around the difference from dense."""
    dense = _dense(rows)
    # Methods with budgets of their own have none here.
    others = [row for row in rows if row["comparison"] and row["budget"]]
    if dense is None or not others:
        return False
    level = 100 * dense["value"]
    axes.axhline(level, color="black", linestyle="--", label="dense")
    for method in dict.fromkeys(row["method"] for row in others):
        own = sorted((r for r in others if r["method"] == method), key=lambda r: r["budget"])
        budgets = [row["budget"] for row in own]
        (line,) = axes.plot(budgets, [100 * row["value"] for row in own], "o-", label=method)
        low, high = ([level + 100 * r["comparison"][end] for r in own] for end in ("low", "high"))
        axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    budgets = sorted({row["budget"] for row in others})
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel("budget (tokens)")
    axes.set_ylabel("right answers (%)")
    return True


def _interval(row: Row, dense: float) -> tuple[float, float]:
    """Of the share of right answers, from that of the difference from dense."""
    comparison = row["comparison"] or {"low": 0.0, "high": 0.0}
    return max(dense + comparison["low"], 0.0), min(dense + comparison["high"], 1.0)


def _against_time(axes: Any, rows: Sequence[Row], results: Sequence[Result]) -> bool:
    """Right answers by the median of a step, a point per budget; a line per setting and context.

    Bars: 95 % intervals of the difference from dense.
    """
    dense = _dense(rows)
    level = dense["value"] if dense else 0.0
    found = False
    for context in values_of(results, "context"):
        here = select(results, context=context)
        seconds = {r.method: r.median for r in here}
        points: dict[str, list[tuple[int, float, Row]]] = {}
        for row in rows:
            kind, budget = kind_of(row), row["budget"]
            if (method := f"{kind}_{budget}") in seconds:
                points.setdefault(str(kind), []).append((budget, 1e3 * seconds[method], row))
        for kind, own in points.items():
            own.sort(key=lambda point: point[0])
            label = f"{kind}, {tokens(context)} tokens"
            shares = [100 * row["value"] for *_, row in own]
            ends = [_interval(row, level) for *_, row in own]
            errors = [[y - 100 * low for y, (low, _) in zip(shares, ends)]]
            errors.append([100 * high - y for y, (_, high) in zip(shares, ends)])
            times = [x for _, x, _ in own]
            axes.errorbar(times, shares, errors, fmt="o-", elinewidth=0.7, capsize=2, label=label)
            for (budget, x, _), y in zip(own, shares):
                axes.annotate(
                    str(budget), (x, y), fontsize=6, xytext=(2, 3), textcoords="offset points"
                )
            found = True
        full = next((r.median for r in here if r.method == "dense_decode"), None)
        if points and dense and full:
            label = f"dense, {tokens(context)} tokens"
            axes.plot([1e3 * full], [100 * dense["value"]], "s", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("ms per call of one layer, or per step")
    axes.set_ylabel("right answers (%)")
    return found
