"""Accuracy against budget, with the dense line and 95 % bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quest_compile.eval.methods import DENSE
from quest_compile.eval.results import Row
from quest_compile.eval.samples import PERPLEXITY

MISSING = "no plots: they need matplotlib (pip install 'quest-compile[plots]')"


def can_plot() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One PNG per task and length; needs matplotlib."""
    paths = []
    for task, length in dict.fromkeys((row.task, row.length) for row in rows):
        own = [row for row in rows if (row.task, row.length) == (task, length)]
        path = folder / f"{task}{f'_{length}' if length else ''}.png".replace("/", "_")
        _plot_one(own, path)
        paths.append(path)
    return paths


def _plot_one(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    is_loss = rows[0].kind == PERPLEXITY
    scale = 1 if is_loss else 100
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    (dense,) = [row.value for row in rows if row.method == DENSE]
    level = 0.0 if is_loss else scale * dense
    axes.axhline(level, color="black", linestyle="--", label="dense")
    # Methods with a budget of their own have no place on the axis.
    for name in dict.fromkeys(row.method for row in rows if row.budget):
        own = sorted((r for r in rows if r.method == name), key=lambda row: row.budget)
        found = [row.comparison for row in own if row.comparison is not None]
        budgets = [row.budget for row in own]
        (line,) = axes.plot(
            budgets, [level + scale * c.difference for c in found], marker="o", label=name
        )
        low, high = ([level + scale * getattr(c, end) for c in found] for end in ("low", "high"))
        axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    budgets = sorted({row.budget for row in rows if row.budget})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel("budget (tokens)")
    axes.set_ylabel("loss minus dense (nats per token)" if is_loss else "score (%)")
    length = rows[0].length or round(rows[0].context_tokens)
    axes.set_title(f"{rows[0].task}, {length} tokens")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
