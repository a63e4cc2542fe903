"""Which bars the plot of score, select and attend has; none where nobody could read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from quest_compile.bench.report.names import is_quest, label, methods_of, tokens
from quest_compile.bench.report.tables import STAGES, first, select, values_of, whole
from quest_compile.bench.results import Result

MAX_BARS = 24
_FACTS = ("shape", "batch", "threads", "context")


def stage_bars(results: Sequence[Result]) -> list[tuple[str, list[float]]]:
    """A label and the seconds of each of ``STAGES`` for every result of Quest that has them, those
    of one context together. Labels name shape, batch, threads and context only where they vary.
    """
    found = []
    for result in whole(results):
        parts = [
            first([r for r in results if r.workload == f"{result.workload}/{stage}"], result.method)
            for stage in STAGES
        ]
        if is_quest(result.method) and all(parts):
            found.append((result, [part.median for part in parts if part]))
    kept = [result for result, _ in found]
    varying = [fact for fact in _FACTS if len(values_of(kept, fact)) > 1]
    order = methods_of(kept)
    found.sort(key=lambda bar: (*(bar[0].metadata[f] for f in varying), order.index(bar[0].method)))
    return [(_short(result, varying), seconds) for result, seconds in found]


def too_many_bars(results: Sequence[Result]) -> list[str]:
    """A sentence for every dtype whose stages are too many to be drawn."""
    sentences = []
    for dtype in values_of(results, "dtype"):
        count = len(stage_bars(select(results, dtype=dtype)))
        if count > MAX_BARS:
            sentences.append(
                f"The plot of stages in {dtype} is left out: it would have {count} bars, more than "
                f"{MAX_BARS}."
            )
    return sentences


def _short(result: Result, facts: Sequence[str]) -> str:
    """Such as ``budget 2048, sketch, 2 threads, 32K tokens``."""
    name = label(result.method).removeprefix("Quest, ")
    name = re.sub(r'`\w+="(\w+)"`', r"\1", name).replace("`", "")
    return ", ".join([name, *(_said(fact, result.metadata[fact]) for fact in facts)])


def _said(fact: str, value: Any) -> str:
    if fact == "context":
        return f"{tokens(value)} tokens"
    return {"shape": f"{value}", "batch": f"batch {value}", "threads": f"{value} threads"}[fact]
