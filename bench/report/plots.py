"""Plots from results, as SVG and PNG; needs matplotlib."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from quest_compile.bench.report.document import tables_for
from quest_compile.bench.report.names import is_quest, label, methods_of, tokens
from quest_compile.bench.report.stage_bars import MAX_BARS, stage_bars
from quest_compile.bench.report.tables import STAGES, first, select, values_of, whole
from quest_compile.bench.results import Result


def write_plots(results: Sequence[Result], folder: Path) -> list[str]:
    """Write what the results allow to ``folder``; returns the names of the SVG files."""
    # Files depend on the results only: no date, fixed ids.
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "quest_compile", "svg.fonttype": "none"})
    written = []
    # Others measure sizes, first tokens or windows, at several contexts perhaps.
    found = [r for r in whole(results) if r.metadata.get("benchmark", "ops") in ("ops", "decode")]
    has_stages = not {"shapes", "threads"} & set(tables_for(results))
    for dtype in values_of(found, "dtype"):
        here = select(found, dtype=dtype)
        plots: dict[str, Callable[[Any], bool]] = {
            "time": functools.partial(_time, results=here),
            "speedup": functools.partial(_speedup, results=here),
        }
        if has_stages:
            own = select(results, dtype=dtype)
            plots["stages"] = functools.partial(_stages, results=own)
        for name, plot in plots.items():
            if draw(plot, f"{_subject(here)}, {dtype}", folder / f"{name}_{dtype}"):
                written.append(f"{name}_{dtype}.svg")
    return written


def draw(plot: Callable[[Any], bool], title: str, path: Path) -> bool:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    if not plot(axes):
        return False
    axes.set_title(title, fontsize=10)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})
    return True


def _subject(results: Sequence[Result]) -> str:
    facts = results[0].metadata
    whats = {"ops": "Decode attention of one layer", "decode": "A decode step"}
    what = whats.get(facts.get("benchmark", ""), "")
    return f"{what}, {facts.get('shape', '')}, {facts.get('cpu_model_name', '')}"


def _series(results: Sequence[Result], method: str) -> list[tuple[int, Result]]:
    """One result per context."""
    series = []
    for context in values_of(results, "context"):
        if own := first(select(results, context=context), method):
            series.append((context, own))
    return series


def _time(axes: Any, results: Sequence[Result]) -> bool:
    """Milliseconds against context, a line per method."""
    if len(values_of(results, "context")) < 2:
        return False
    for method in methods_of(results):
        series = _series(results, method)
        if method == "read_loop" and "model_bytes" in series[0][1].metadata:
            continue
        xs, ys = [x for x, _ in series], [1e3 * r.median for _, r in series]
        axes.plot(xs, ys, "o-", label=_plain(method))
    _context_axis(axes, results)
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    return True


def _speedup(axes: Any, results: Sequence[Result]) -> bool:
    """How many times faster than dense_decode; dashed, what the bytes would allow."""
    quests = [m for m in methods_of(results) if is_quest(m)]
    dense = dict(_series(results, "dense_decode"))
    if len(dense) < 2 or not quests:
        return False
    for method in quests:
        series = [(x, r) for x, r in _series(results, method) if x in dense]
        xs = [x for x, _ in series]
        (line,) = axes.plot(
            xs, [dense[x].median / r.median for x, r in series], "o-", label=_plain(method)
        )
        ideal = [dense[x].metadata["bytes_moved"] / r.metadata["bytes_moved"] for x, r in series]
        axes.plot(xs, ideal, "--", color=line.get_color(), label=f"{_plain(method)}, by bytes")
    _context_axis(axes, results)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_ylabel("times faster than dense_decode")
    return True


def _stages(axes: Any, results: Sequence[Result]) -> bool:
    """A horizontal bar of score, select and attend per result."""
    bars = stage_bars(results)
    if not 0 < len(bars) <= MAX_BARS:
        return False
    places = range(len(bars))
    left = [0.0] * len(bars)
    for i, stage in enumerate(STAGES):
        widths = [1e6 * seconds[i] for _, seconds in bars]
        axes.barh(places, widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths)]
    axes.set_yticks(places, [name for name, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set_xlabel("us")
    return True


def _context_axis(axes: Any, results: Sequence[Result]) -> None:
    contexts = values_of(results, "context")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [tokens(c) for c in contexts])
    axes.set_xlabel("tokens of context")


def _plain(method: str) -> str:
    return label(method).replace("`", "")
