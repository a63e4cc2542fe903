"""In place of every sparse attention call one that keeps its pages (``record`` of the settings)."""

from __future__ import annotations

import contextlib

import torch
from torch import fx

from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.passes.add_audits import SPARSE
from quest_compile.passes.add_page_summaries import add_static_input
from quest_compile.passes.graph import example_value


def add_recordings(graph: fx.Graph, *, config: QuestConfig) -> list[fx.Node]:
    """Replace the calls by quest::recorded_decode; returns the input each gained, in order."""
    *_, last = graph.find_nodes(op="placeholder")
    added: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in SPARSE:
            continue
        query, key_cache, value_cache, *rest = node.args
        with graph.inserting_before(node):
            if node.target is torch.ops.quest.sparse_decode_step.default:
                cache_position, page_summary, num_sealed, *lengths = rest
                graph.call_function(
                    torch.ops.quest.update_page_summary.default,
                    (key_cache, cache_position, page_summary, num_sealed),
                    config.page_format.as_kwargs(),
                )
            else:
                page_summary, *lengths = rest
        keys = example_value(key_cache)
        selection = ops.Selection.take(dict(node.kwargs))
        with getattr(keys, "fake_mode", None) or contextlib.nullcontext():
            value = ops.new_recording(
                config.max_q_len, example_value(query), keys, selection, config.page_size
            )
        last = add_static_input(graph, last, f"quest_recording_{len(added)}", value)
        with graph.inserting_before(node):
            new = graph.call_function(
                torch.ops.quest.recorded_decode.default,
                (query, key_cache, value_cache, page_summary, *lengths, last),
                node.kwargs,
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        added.append(last)
    return added
