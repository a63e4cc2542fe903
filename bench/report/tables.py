"""Markdown tables from results. Each takes the results of one folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quest_compile.bench.report.names import is_quest, label, methods_of, seconds, tokens
from quest_compile.bench.results import Result

STAGES = ("score", "select", "attend")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def select(results: Sequence[Result], **facts: Any) -> list[Result]:
    """Those whose metadata has these values; no stages unless asked for by name."""
    return [r for r in results if all(r.metadata.get(k) == v for k, v in facts.items())]


def whole(results: Sequence[Result]) -> list[Result]:
    """Without the stages of Quest and the costs of tiny calls."""
    parts = ("update", *STAGES)
    return [r for r in results if "context" in r.metadata and not r.workload.endswith(parts)]


def values_of(results: Sequence[Result], name: str) -> list[Any]:
    """The different values of one metadata field, in order of appearance or size."""
    found = {r.metadata[name] for r in results if name in r.metadata}
    return sorted(found)


def attention(results: Sequence[Result]) -> str:
    """All methods at the longest context: time and fraction of the read loop, by dtype."""
    found = whole(results)
    context = max(values_of(found, "context"))
    found = select(found, context=context)
    dtypes = values_of(found, "dtype")
    header = [f"{tokens(context)} tokens"]
    header += [cell for dtype in dtypes for cell in (dtype, "of read", "dense / this")]
    rows = []
    for method in methods_of(found):
        cells = [label(method)]
        for dtype in dtypes:
            own = first(select(found, dtype=dtype), method)
            dense = first(select(found, dtype=dtype), "dense_decode")
            cells += _cells(own, dense)
        rows.append(cells)
    return markdown(header, rows)


def _cells(own: Result | None, dense: Result | None) -> list[str]:
    if own is None:
        return ["-"] * 3
    share = own.metadata.get("fraction_of_read_loop")
    return [
        seconds(own.median) + mark(own),
        f"{share:.2f}" if share is not None else "",
        f"{dense.median / own.median:.2g}" if dense else "",
    ]


def contexts(results: Sequence[Result]) -> str:
    """dense_decode and Quest by context, the speed-up and what the bytes would allow."""
    found = whole(results)
    quests = [m for m in methods_of(found) if is_quest(m)]
    header = ["", "dense"]
    for method in quests:
        header += [label(method), "times faster", "by bytes"]
    rows = []
    for dtype in values_of(found, "dtype"):
        for context in values_of(found, "context"):
            here = select(found, dtype=dtype, context=context)
            dense = first(here, "dense_decode")
            if dense is None:
                continue
            cells = [f"{dtype}, {tokens(context)}", seconds(dense.median) + mark(dense)]
            for method in quests:
                own = first(here, method)
                cells += ["-"] * 3 if own is None else [seconds(own.median) + mark(own)]
                if own is not None:
                    ideal = dense.metadata["bytes_moved"] / own.metadata["bytes_moved"]
                    cells += [f"{dense.median / own.median:.2f}", f"{ideal:.1f}"]
            rows.append(cells)
    table = markdown(header, rows)
    return table + "".join(f"\n{line}\n" for line in break_even(found, quests))


def break_even(results: Sequence[Result], quests: Sequence[str]) -> list[str]:
    """From which context on Quest is faster than dense, interpolated between those measured."""
    lines = []
    for dtype in values_of(results, "dtype"):
        for method in quests:
            ratios = []
            for context in values_of(results, "context"):
                here = select(results, dtype=dtype, context=context)
                dense, own = first(here, "dense_decode"), first(here, method)
                if dense and own and context > own.metadata["budget"]:
                    ratios.append((context, dense.median / own.median))
            lines.append(f"{label(method)}, {dtype}: {_first_above_one(ratios)}.")
    return lines


def _first_above_one(ratios: list[tuple[int, float]]) -> str:
    """``ratios`` by context, beyond the budget."""
    slower = [i for i, (_, ratio) in enumerate(ratios) if ratio < 1]
    if not ratios:
        return "every context is within the budget"
    if not slower:
        return f"faster from {ratios[0][0]} tokens on, the shortest measured beyond the budget"
    last = slower[-1]
    if last + 1 == len(ratios):
        return f"not faster at {ratios[-1][0]} tokens, the longest measured"
    (low, below), (high, above) = ratios[last : last + 2]
    return f"faster from {low + (high - low) * (1 - below) / (above - below):.0f} tokens on"


def stages(results: Sequence[Result]) -> str:
    """Score, select and attend, beside the fused whole."""
    found = [r for r in results if is_quest(r.method) and "context" in r.metadata]
    rows = []
    for result in whole(found):
        parts = [_find(found, f"{result.workload}/{stage}", result.method) for stage in STAGES]
        if all(parts):
            where = f"{result.metadata['dtype']}, {tokens(result.metadata['context'])}"
            cells = [seconds(r.median) + mark(r) for r in (*parts, result) if r]
            rows.append([f"{label(result.method)}, {where}", *cells])
    return markdown(["", *STAGES, "in one operator"], rows)


def overhead(results: Sequence[Result]) -> str:
    """Microseconds of a call that reads nothing."""
    rows = [
        [r.workload.partition("/")[2], f"{1e6 * r.median:.1f} us{mark(r)}"]
        for r in results
        if r.workload.startswith("overhead/")
    ]
    return markdown(["", "a call"], rows)


def first(results: Sequence[Result], method: str) -> Result | None:
    return next((r for r in results if r.method == method), None)


def _find(results: Sequence[Result], workload: str, method: str) -> Result | None:
    return first([r for r in results if r.workload == workload], method)


def mark(result: Result) -> str:
    """A sign behind values that are not to be trusted."""
    return " (!)" if result.marked or "interrupted" in result.metadata else ""


def quantity(result: Result) -> str:
    """The median with its unit."""
    if result.unit == "byte":
        return f"{result.median / 2**20:.1f} MiB"
    return seconds(result.median)


OPS_TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "attention": attention,
    "contexts": contexts,
    "stages": stages,
    "overhead": overhead,
}
