"""The results as Markdown, and the lines printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quest_compile.eval.results import Row
from quest_compile.eval.samples import COPY, PERPLEXITY
from quest_compile.eval.statistics import Comparison

_SAME = "same tokens"
_HEADER = (
    "method", "budget", "score", "difference (95 %)", "lost / gained", _SAME,
    "sparse steps", "tokens read", "mass kept", "verdict",
)  # fmt: skip


def markdown(
    rows: Sequence[Row],
    identity: dict[str, Any],
    settings: dict[str, Any],
    conditions: Sequence[dict[str, Any]],
    is_complete: bool = True,
) -> str:
    """The whole page: settings, a table per task and length, what served each method, and which
    rows were measured under which ``conditions`` where those changed.

    ``is_complete``: False for a run that was interrupted.
    """
    lines = [f"# Accuracy of {settings['model']}", ""]
    described = (*identity.items(), *((k, v) for k, v in settings.items() if k != "model"))
    lines += ["; ".join(f"{name} {value}" for name, value in described if value is not None), ""]
    if not is_complete:
        lines += ["**Interrupted**: rows may have fewer samples than asked for, or be missing.", ""]
    for task, length in dict.fromkeys((row.task, row.length) for row in rows):
        own = [row for row in rows if (row.task, row.length) == (task, length)]
        lines += [f"## {_title(own[0])}", "", *table(own), ""]
    lines += ["## What served", ""]
    for name, served in dict.fromkeys((row.method, row.implementation) for row in rows):
        lines.append(f"- {name}: {served}")
    if len(conditions) > 1:
        lines += ["", "## Measured in parts", "", *_parts(rows, conditions)]
    return "\n".join(lines) + "\n"


def _parts(rows: Sequence[Row], conditions: Sequence[dict[str, Any]]) -> list[str]:
    """The conditions of each part, and the rows that have cells of it."""
    lines = []
    for number, found in enumerate(conditions):
        own = [f"{r.task} {r.method} {r.budget}" for r in rows if number in r.conditions]
        described = "; ".join(f"{name} {value}" for name, value in found.items())
        lines.append(f"- {described}: {', '.join(own)}")
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of the rows of one task and length."""
    has_losses = rows[0].kind == COPY
    header = tuple(
        "loss, difference (95 %)" if has_losses and name == _SAME else name for name in _HEADER
    )
    cells = [header, tuple("-" * 3 for _ in header), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in cells
    ]


def _title(row: Row) -> str:
    length = f", {row.length} tokens" if row.length else f", {row.context_tokens:.0f} tokens"
    unit = "loss in nats per token" if row.kind == PERPLEXITY else "score in %"
    return f"{row.task}{length}, {row.num_contexts} contexts ({unit})"


def _cells(row: Row) -> tuple[str, ...]:
    is_loss = row.kind == PERPLEXITY
    difference = changed = ""
    verdict = row.verdict
    if row.comparison is not None:
        found = row.comparison
        difference = _difference(found, is_loss)
        changed = f"{found.lost:.4g} / {found.gained:.4g} of {found.num_samples}"
    return (
        row.method,
        str(row.budget or ""),
        f"{row.value:.4f}" if is_loss else f"{100 * row.value:.1f}",
        difference,
        changed,
        _loss_or_same(row),
        f"{row.sparse_steps} of {row.steps}",
        _tokens(row),
        "" if row.mass_kept is None else f"{row.mass_kept:.3f}",
        verdict,
    )


def _difference(found: Comparison, is_loss: bool) -> str:
    numbers = (found.difference, found.low, found.high)
    difference, low, high = (f"{x:+.4f}" if is_loss else f"{100 * x:+.1f}" for x in numbers)
    return f"{difference} ({low} to {high})"


def _loss_or_same(row: Row) -> str:
    if row.loss is not None:
        found = row.loss_comparison
        return f"{row.loss:.4f}" + (f", {_difference(found, is_loss=True)}" if found else "")
    return "" if row.same_as_dense is None else f"{100 * row.same_as_dense:.1f} %"


def _tokens(row: Row) -> str:
    if row.sparse_steps and row.tokens_read is None:
        return "not counted on this device"
    read = row.context_tokens if row.tokens_read is None else row.tokens_read
    return f"{read:.0f} of {row.context_tokens:.0f}"
