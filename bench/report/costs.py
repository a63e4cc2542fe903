"""Tables of what Quest costs besides the time of a step, from folders of several benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quest_compile.bench.report.names import label, methods_of, tokens
from quest_compile.bench.report.tables import mark, markdown, quantity, values_of
from quest_compile.bench.results import Result


def costs(results: Sequence[Result]) -> str:
    """A table for each of compile, memory, longrun and overhead that there is.

    Raises:
        ValueError: results of another benchmark.
    """
    benchmarks = values_of(results, "benchmark")
    if unknown := [name for name in benchmarks if name not in _TABLES]:
        raise ValueError(
            f"table costs: expected results of {', '.join(_TABLES)}, got {', '.join(unknown)}"
        )
    return "\n".join(
        table([r for r in results if r.metadata["benchmark"] == name])
        for name, table in _TABLES.items()
        if name in benchmarks
    )


def _compile(results: Sequence[Result]) -> str:
    return _by_method(
        results,
        {
            "first token, cold": "first token, cold",
            "first token, warm": "first token, warm",
            "passes": "of which passes",
        },
    )


def _memory(results: Sequence[Result]) -> str:
    return _by_method(
        results,
        {"cache": "cache", "page_summaries": "page summaries", "peak": "peak while decoding"},
    )


def _longrun(results: Sequence[Result]) -> str:
    """Steps in the first and the last window."""
    windows = sorted({_last(r) for r in results}, key=_begin)
    return _by_method(results, {name: f"a step, {name}" for name in (windows[0], windows[-1])})


def _begin(window: str) -> int:
    """500 of ``tokens 500-1000``."""
    return int(window.split()[1].partition("-")[0])


def _overhead(results: Sequence[Result]) -> str:
    """Of the graph with the most layers."""
    layers = max(int(_place(r).partition("/")[2].split()[0]) for r in results)
    own = {_last(r): r for r in results if _place(r) == f"overhead/{layers} layers"}
    cells = [_cell(own.get(name)) for name in ("passes", "a step with state")]
    header = ["", "passes", "state of the caches, a step"]
    return markdown(header, [[f"{layers} layers", *cells]])


def _by_method(results: Sequence[Result], columns: dict[str, str]) -> str:
    """A row per method; for every model and context the ``columns``: the last part of a workload,
    and what heads it.
    """
    by_context = sorted(results, key=lambda r: r.metadata["context"])
    places = {_place(r): r.metadata for r in by_context}
    header = [""]
    for facts in places.values():
        first, *others = columns.values()
        header += [f"{facts['shape']}, {tokens(facts['context'])} tokens: {first}", *others]
    found = {(r.method, r.workload): r for r in results}
    rows = [
        [label(method)]
        + [_cell(found.get((method, f"{place}/{part}"))) for place in places for part in columns]
        for method in methods_of(results)
    ]
    return markdown(header, rows)


def _cell(result: Result | None) -> str:
    return "-" if result is None else quantity(result) + mark(result)


def _place(result: Result) -> str:
    return result.workload.rpartition("/")[0]


def _last(result: Result) -> str:
    return result.workload.rpartition("/")[2]


_TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "compile": _compile,
    "memory": _memory,
    "longrun": _longrun,
    "overhead": _overhead,
}
