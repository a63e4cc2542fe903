"""What became of every attention call: the table behind ``backend.report()`` and ``explain``."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quest_compile import ops
from quest_compile.added_inputs import AddedInputs
from quest_compile.audits import AUDIT_COLUMNS, GraphAudits, audit_cells
from quest_compile.budgets import LayerBudget
from quest_compile.compiled_functions import function_of, is_given_up
from quest_compile.config import QuestConfig
from quest_compile.graph_report import GraphReport, ReportRow, report_row
from quest_compile.passes import Rewrite, Treatment
from quest_compile.passes.graph import example_value
from quest_compile.report_notes import NOTHING_COMPILED, notes_on

log = logging.getLogger(__name__)


class Report:
    """The graphs a backend compiled; ``str()`` gives the table."""

    def __init__(
        self,
        graphs: Sequence[GraphReport],
        others: Sequence[str] = (),
        dense_generations: Mapping[str, int] | None = None,
    ) -> None:
        self.graphs = tuple(graphs)
        self._others = tuple(others)
        self._dense_generations = dict(dense_generations or {})

    @property
    def rows(self) -> tuple[ReportRow, ...]:
        """The attention calls of all graphs."""
        return tuple(row for graph in self.graphs for row in graph.rows)

    def count(self, treatment: Treatment | str) -> int:
        """Calls with this treatment over all graphs."""
        return sum(graph.count(Treatment(treatment)) for graph in self.graphs)

    @property
    def uncompiled(self) -> tuple[str, ...]:
        """Functions of which some calls fit none of the graphs torch keeps of them: those run
        uncompiled, so dense, and stand in no row."""
        given_up = {g.function.name: None for g in self.graphs if is_given_up(g.function)}
        return tuple(given_up)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kernels": ops.native_status().info,
            "cuda_kernels": ops.cuda_kernels(),
            "uncompiled": list(self.uncompiled),
            "graphs": [
                {
                    "config": graph.config.as_dict(),
                    "mode": graph.mode,
                    "inner": graph.inner,
                    "rewrite_seconds": graph.rewrite_seconds,
                    "linear": graph.linear.as_dict(),
                    "rows": [
                        row.as_dict() | {"audit": audit and dataclasses.asdict(audit)}
                        for row, audit in graph.audited_rows()
                    ],
                }
                for graph in self.graphs
            ],
            "dense_generations": self._dense_generations,
        }

    def __str__(self) -> str:
        dense = [
            f"{num} generate() call{'s' if num > 1 else ''} decoded densely: {cause}"
            for cause, num in self._dense_generations.items()
        ]
        if not self.graphs:
            if dense:
                return "\n".join(["quest_compile: no graph was compiled by this backend.", *dense])
            others = "".join(f"\n  - another backend compiled: {name}" for name in self._others)
            return f"quest_compile: {NOTHING_COMPILED}{others}"
        lines = [f"quest_compile: CPU kernels: {_kernels()}"]
        for i, graph in enumerate(self.graphs):
            lines += ["", f"graph {i}: {graph.summary}", _settings(graph), *_table(graph)]
            lines += [graph.linear_layers] if graph.linear_layers else []
        for note in notes_on(self.graphs):
            lines += ["", note]
        lines += ["", *dense] if dense else []
        return "\n".join(lines)

    __repr__ = __str__


def report_rewrite(
    rewrite: Rewrite,
    config: QuestConfig,
    mode: str | None,
    inner: str,
    inductor_options: Mapping[str, Any],
    audits: GraphAudits | None = None,
    recordings: AddedInputs | None = None,
) -> GraphReport:
    """Describe one rewritten graph, and tell the log and the structured trace."""
    graph = GraphReport(
        rows=tuple(report_row(decision, config) for decision in rewrite.decisions),
        config=config,
        mode=mode,
        inner=inner,
        rewrite_seconds=rewrite.seconds,
        function=function_of(rewrite.gm),
        is_cuda_graph=_is_cuda_graph(rewrite, inner, inductor_options),
        audits=audits,
        recordings=recordings,
        linear=rewrite.linear,
    )
    if graph.rows:
        log.info("%s", "\n".join([graph.summary, _settings(graph), *_table(graph)]))
        torch._logging.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "quest_compile_report", "encoding": "json"},
            payload_fn=lambda: json.dumps(Report([graph]).as_dict(), default=str),
        )
    return graph


def _is_cuda_graph(rewrite: Rewrite, inner: str, inductor_options: Mapping[str, Any]) -> bool:
    values = [example_value(node) for node in rewrite.gm.graph.find_nodes(op="placeholder")]
    on_cuda = any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in values)
    return on_cuda and inner == "inductor" and bool(inductor_options.get("triton.cudagraphs"))


def _table(graph: GraphReport) -> list[str]:
    is_audited = graph.config.audit > 0
    header = ["layer", "", "attention", "pages", "tokens", "why", "where"]
    header[5:5] = AUDIT_COLUMNS if is_audited else ()
    cells = [header]
    for row, audit in graph.audited_rows():
        line = [
            "?" if row.layer is None else str(row.layer),
            row.treatment.value,
            row.attention,
            "-" if row.pages is None else str(row.pages),
            _tokens(row),
            row.reason.value,
            row.source,
        ]
        line[5:5] = audit_cells(audit) if is_audited else ()
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]


def _tokens(row: ReportRow) -> str:
    """Without a budget it is the capacity of the cache, most of which may not be written yet."""
    if row.tokens is None:
        return "-"
    return str(row.tokens) if row.treatment is Treatment.SPARSE else f"{row.tokens} (cache)"


def _settings(graph: GraphReport) -> str:
    """One line, in the names of the settings."""
    config = graph.config
    budget = "of each layer" if callable(config.budget) else config.budget
    selection = config.selection(LayerBudget(0, sys.maxsize))
    parts = [f"budget {budget}", str(config.page_format), str(selection), f"inner {graph.inner}"]
    parts += [f"mode {graph.mode}"] if graph.mode else []
    parts += ["linear torch"] if config.linear == "torch" else []
    parts += ["CUDA graph"] if graph.is_cuda_graph else []
    return ", ".join(parts)


def _kernels() -> str:
    status = ops.native_status()
    cpu = status.info.partition(" cuda:")[0]
    info = cpu if status.loaded else f"torch reference, slow ({status.reason})"
    return f"{info}; CUDA kernels: {ops.cuda_kernels()}" if torch.cuda.is_available() else info
