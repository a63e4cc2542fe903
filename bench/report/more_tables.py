"""Tables of shapes, instruction sets, threads, whole models, and all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quest_compile.bench.report.costs import costs
from quest_compile.bench.report.names import is_quest, label, methods_of, seconds, tokens
from quest_compile.bench.report.tables import (
    OPS_TABLES,
    first,
    mark,
    markdown,
    quantity,
    select,
    values_of,
    whole,
)
from quest_compile.bench.results import Result

_TRANSFORMERS = "dense_transformers"


def shapes(results: Sequence[Result]) -> str:
    """How the methods do on every layer shape: the fraction of the read loop."""
    return _by_workload(results, "fraction_of_read_loop")


def levels(results: Sequence[Result]) -> str:
    """Times per instruction set."""
    return _by_workload(results, None)


def threads(results: Sequence[Result]) -> str:
    """Times per number of threads."""
    return _by_workload(results, None)


def _by_workload(results: Sequence[Result], fact: str | None) -> str:
    found = whole(results)
    methods = methods_of(found)
    rows = []
    for workload in dict.fromkeys(r.workload for r in found):
        here = [r for r in found if r.workload == workload]
        cells = [workload]
        for method in methods:
            own = first(here, method)
            if own is None:
                cells.append("-")
            elif fact:
                cells.append(f"{own.metadata[fact]:.2f}{mark(own)}")
            else:
                cells.append(seconds(own.median) + mark(own))
        rows.append(cells)
    return markdown(["", *map(label, methods)], rows)


def decode(results: Sequence[Result]) -> str:
    """Milliseconds per token by context, and how many times faster than transformers and dense."""
    found = [r for r in whole(results) if r.method != "read_loop"]
    lengths = values_of(found, "context")
    header = [""]
    for context in lengths:
        header += [f"{tokens(context)} tokens", "of read", "against transformers", "against dense"]
    rows = []
    for method in methods_of(found):
        cells = [label(method)]
        for context in lengths:
            here = select(found, context=context)
            own = first(here, method)
            if own is None:
                cells += ["-"] * 4
                continue
            cells += [
                f"{seconds(own.median)}{mark(own)}",
                f"{own.metadata['fraction_of_read_loop']:.2f}",
            ]
            for baseline in ("dense_transformers", "dense_decode"):
                base = first(here, baseline)
                cells.append(f"{base.median / own.median:.2f}x" if base else "-")
        rows.append(cells)
    return markdown(header, rows)


def decode_short(results: Sequence[Result]) -> str:
    """Five rows of decode: Quest at its largest budget, as it is by default if that was measured,
    and how many times faster than transformers and dense at the longest context."""
    found = whole(results)
    quests = [r for r in found if is_quest(r.method)]
    quest = min(quests, key=lambda r: (not r.method.startswith("quest_"), -r.metadata["budget"]))
    lengths = values_of(found, "context")
    header = ["", *(f"{tokens(context)} tokens" for context in lengths)]
    header += [f"against {name}, {tokens(lengths[-1])}" for name in ("transformers", "dense")]
    longest = select(found, context=lengths[-1])
    rows = []
    for method in (quest.method, "dense_decode", "llama_cpp", "dense_enable_gqa", _TRANSFORMERS):
        own = [first(select(found, context=context), method) for context in lengths]
        cells = [label(method), *(seconds(r.median) + mark(r) if r else "-" for r in own)]
        for baseline in (_TRANSFORMERS, "dense_decode"):
            base = first(longest, baseline)
            cells.append(f"{base.median / own[-1].median:.2f}x" if base and own[-1] else "-")
        rows.append(cells)
    return markdown(header, rows)


def quantities(results: Sequence[Result]) -> str:
    """Any benchmark: medians with their unit, a row per workload, a column per method."""
    methods = methods_of(results)
    rows = []
    for workload in dict.fromkeys(r.workload for r in results):
        cells = [workload]
        for method in methods:
            own = first([r for r in results if r.workload == workload], method)
            cells.append("-" if own is None else quantity(own) + mark(own))
        rows.append(cells)
    return markdown(["", *map(label, methods)], rows)


TABLES: dict[str, Callable[[Sequence[Result]], str]] = OPS_TABLES | {
    "shapes": shapes,
    "levels": levels,
    "threads": threads,
    "decode": decode,
    "decode_short": decode_short,
    "quantities": quantities,
    "costs": costs,
}
