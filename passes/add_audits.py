"""After every sparse attention call: compare it with full attention (``audit`` of the settings)."""

from __future__ import annotations

import contextlib

import torch
from torch import fx

from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.passes.add_page_summaries import add_static_input
from quest_compile.passes.graph import example_value

SPARSE = (torch.ops.quest.sparse_decode.default, torch.ops.quest.sparse_decode_step.default)


def add_audits(graph: fx.Graph, *, config: QuestConfig) -> list[fx.Node]:
    """Add quest::audit calls; returns the input each gained, in the order of the calls."""
    *_, last = graph.find_nodes(op="placeholder")
    added: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in SPARSE:
            continue
        query, key_cache, value_cache, *rest = node.args
        if node.target is torch.ops.quest.sparse_decode_step.default:
            _, page_summary, _, seq_lens, attn_mask = rest
        else:
            page_summary, seq_lens, attn_mask = rest
        keys = example_value(key_cache)
        with getattr(keys, "fake_mode", None) or contextlib.nullcontext():
            value = ops.new_audit_totals(keys.device)
        last = add_static_input(graph, last, f"quest_audit_{len(added)}", value)
        caches = (query, key_cache, value_cache, page_summary)
        with graph.inserting_after(node):
            graph.call_function(
                torch.ops.quest.audit.default,
                (*caches, seq_lens, attn_mask, node, last),
                {"every": config.audit, **node.kwargs},
            )
        added.append(last)
    return added
