"""What a report says under its tables: what a user may want to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from quest_compile.budgets import LayerBudgets
from quest_compile.compiled_functions import is_full, is_given_up
from quest_compile.graph_report import GraphReport, ReportRow
from quest_compile.passes import Reason, Treatment

NOTHING_COMPILED = """\
no graph was compiled by this backend. Likely reasons:
  - torch.compile(model, ...).generate(...) calls the uncompiled model: use
    quest_compile.compile_for_generate(model, ...) and model.generate(...)
  - the compiled model has not been called yet
  - generate() ran without a static cache, or compiled with another backend; with a plain
    CompileConfig(backend=...) transformers compiles on GPUs only
  - generate() was told not to compile (disable_compile, use_cache=False), or does not: beams,
    drafts, some quantizers, models partly on disk or in CPU memory (docs/generate.md); or it was
    generate_batch(), which keeps a paged cache of its own"""


def notes_on(graphs: Sequence[GraphReport]) -> Iterator[str]:
    rows = [row for graph in graphs for row in graph.rows]
    yield from _functions(graphs)
    for config in dict.fromkeys(graph.config for graph in graphs):
        if said := unknown_layers([graph for graph in graphs if graph.config == config]):
            yield said
    if any(row.reason is Reason.UNKNOWN_LAYER for row in rows):
        yield (
            "A graph whose layer is not known may serve several layers: num_dense_layers=0 and one "
            "budget for all make it sparse, or compile the whole model."
        )
    if any(row.treatment is Treatment.SPARSE and row.queries != 1 for row in rows):
        yield (
            "Several queries at once are decoded sparsely whatever they are: drafts, a short "
            "question, or the last few tokens of a prompt in chunks. max_q_len=1 leaves them dense."
        )
    if not any(row.treatment is Treatment.SPARSE for row in rows):
        yield _why_not_sparse(rows)


def unknown_layers(graphs: Sequence[GraphReport]) -> str:
    """Of graphs with one configuration: which layers its budget names that none of them has."""
    rows = [
        row.layer
        for graph in graphs
        if graph.is_decode
        for row in graph.rows
        if row.layer is not None
    ]
    budget = graphs[0].config.budget
    named = set(budget) - {"default"} if isinstance(budget, LayerBudgets) else set()
    if not rows or not (unknown := sorted(named - set(rows))):
        return ""
    layers = f"layer{'s' if len(unknown) > 1 else ''} {', '.join(map(str, unknown))}"
    return f"budget: there is no {layers}, only 0 to {max(rows)}"


def _functions(graphs: Sequence[GraphReport]) -> Iterator[str]:
    """Those of which some calls run uncompiled, or may."""
    num_graphs = Counter(graph.function.frame for graph in graphs)
    functions = {graph.function.frame: graph.function for graph in graphs}
    for frame, function in functions.items():
        number = num_graphs[frame]
        if is_given_up(function):
            yield (
                f"{function.name}: calls that fit none of its {number} graphs run uncompiled, so "
                "dense, and stand in no row. Layers that are compiled one by one take a graph "
                "each: raise torch._dynamo.config.recompile_limit, or compile the whole model."
            )
        elif is_full(function, number):
            yield (
                f"{function.name} has the {number} graphs that torch keeps of a function "
                "(recompile_limit): calls that need another one run uncompiled, so dense."
            )


def _why_not_sparse(rows: Sequence[ReportRow]) -> str:
    if not rows:
        return (
            "No attention call was found in what was compiled: load the model with "
            'attn_implementation="sdpa" (some models, with attention sinks or ALiBi, have none), '
            "and check that it is the model that was compiled."
        )
    reasons = {row.reason for row in rows}
    without_decoding = {Reason.NOT_A_CACHE, Reason.CACHE_CREATED_IN_GRAPH}
    if reasons <= without_decoding | {Reason.PREFILL, Reason.PREFILL_ALONE}:
        return (
            "No decode step over a static cache was compiled: pass past_key_values=StaticCache(...)"
            " (cache=StaticCache(...) from transformers 5.24 on; in generate: "
            'cache_implementation="static").'
        )
    return "No attention call is sparse: see the column 'why'."
