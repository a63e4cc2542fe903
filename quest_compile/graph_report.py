"""What became of the attention calls of one graph."""

from __future__ import annotations

import dataclasses
from typing import Any

from quest_compile import ops
from quest_compile.added_inputs import AddedInputs
from quest_compile.audits import GraphAudits
from quest_compile.compiled_functions import CompiledFunction
from quest_compile.config import QuestConfig
from quest_compile.passes import Decision, LinearLayers, LinearReason, Reason, Treatment
from quest_compile.passes.graph import example_value

_OF_DECODE = frozenset(
    {Reason.SPARSE, Reason.DENSE_LAYER, Reason.UNKNOWN_LAYER, Reason.BUDGET_COVERS_CACHE}
)


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One attention call.

    ``layer``: counted from 0; None where the graph does not say which layer it is.
    ``queries``: at once; the name of a symbol where the graph serves several numbers.
    ``pages`` and ``tokens``: what a query attends at most, in a dense call the capacity of the
    cache; None where there is no static cache.
    ``attention``: the operator that runs it.
    """

    layer: int | None
    treatment: Treatment
    reason: Reason
    attention: str
    pages: int | str | None
    tokens: int | str | None
    source: str
    queries: int | str

    def as_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return fields | {"treatment": self.treatment.value, "reason": self.reason.name}


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph that was compiled: ``rows`` in graph order, ``config`` in force, seconds spent.

    ``inner``: what compiled the rewritten graph; not ``config.inner`` where that was not possible.
    ``function``: what was compiled: a model, or a part of it.
    ``is_cuda_graph``: Inductor was asked to run it as a CUDA graph.
    ``audits``: of the sparse rows; reading them waits for the device. ``recordings``: their pages.
    ``linear``: what became of the linear layers.
    """

    rows: tuple[ReportRow, ...]
    config: QuestConfig
    mode: str | None
    inner: str
    rewrite_seconds: float
    function: CompiledFunction
    is_cuda_graph: bool = False
    audits: GraphAudits | None = None
    recordings: AddedInputs | None = None
    linear: LinearLayers = LinearLayers()

    def audited_rows(self) -> list[tuple[ReportRow, ops.Audit | None]]:
        """Every row, the sparse ones with what their audits found; None without ``audit``."""
        found = iter(self.audits.read() if self.audits else ())
        is_sparse = [row.treatment is Treatment.SPARSE for row in self.rows]
        return [(row, next(found, None) if is_ else None) for row, is_ in zip(self.rows, is_sparse)]

    def count(self, treatment: Treatment | str) -> int:
        return sum(row.treatment is Treatment(treatment) for row in self.rows)

    @property
    def is_decode(self) -> bool:
        """Does this graph decode one token over a static cache?"""
        return any(row.reason in _OF_DECODE for row in self.rows)

    @property
    def linear_layers(self) -> str:
        """A line on them; empty where a graph has none of few rows."""
        linear = self.linear
        left = (f"{count} left to torch: {why.value}" for why, count in linear.left.items())
        if not linear.num_replaced and set(linear.left) <= {LinearReason.MANY_ROWS}:
            return ""
        size = f"{linear.weight_bytes / 1e6:,.1f} MB of weights per step"
        replaced = f"{linear.num_replaced} quest::linear_decode, {size}"
        return "linear layers: " + "; ".join([replaced, *left])

    @property
    def summary(self) -> str:
        counts = ", ".join(f"{self.count(t)} {t.value}" for t in Treatment)
        queries = "/".join(sorted({str(row.queries) for row in self.rows}))
        several = "" if queries in ("", "1") else f" of {queries} queries"
        return f"{len(self.rows)} attention calls{several}: {counts}"


def report_row(decision: Decision, config: QuestConfig) -> ReportRow:
    call, site = decision.call, decision.call.site
    is_sparse = decision.treatment is Treatment.SPARSE
    pages: int | str | None = None
    tokens: int | str | None = None
    if site is not None:
        max_seq_len = example_value(site.key_cache).shape[2]
        if decision.budget is not None:
            pages, tokens = decision.budget.pages, decision.budget.tokens
        elif isinstance(max_seq_len, int):
            pages, tokens = -(-max_seq_len // config.page_size), max_seq_len
        else:
            pages, tokens = "all", "all"
    attention = "sdpa"
    if decision.operator:
        attention = f"quest::{decision.operator}"
    if is_sparse and config.record:
        attention = "quest::recorded_decode"
    elif decision.needs_summary and not is_sparse:
        attention += " + page summary"
    return ReportRow(
        call.layer,
        decision.treatment,
        decision.reason,
        attention,
        pages,
        tokens,
        call.source,
        call.queries,
    )
