"""Put quest::sparse_decode and quest::dense_decode where attention over a static cache was."""

from __future__ import annotations

import operator

import torch
from torch import fx

from quest_compile.config import QuestConfig
from quest_compile.passes.add_page_summaries import SummaryInputs
from quest_compile.passes.decide import Decision, Treatment
from quest_compile.passes.graph import (
    erase_dead_views,
    example_value,
    is_written,
    same_size,
)


def replace_attention(
    graph: fx.Graph,
    decisions: list[Decision],
    summaries: list[SummaryInputs],
    *,
    config: QuestConfig,
) -> int:
    """Rewrite the decode calls in place; returns how many were."""
    summary_of = {inputs.key_cache: inputs for inputs in summaries}
    derived = _DerivedInputs(graph)
    replaced: dict[fx.Node, fx.Node] = {}
    for decision in decisions:
        site, node = decision.call.site, decision.call.node
        is_sparse = decision.treatment is Treatment.SPARSE
        if site is None or not (is_sparse or decision.uses_dense_decode):
            continue
        query = replaced.get(site.query, site.query)
        caches = (query, site.key_cache, site.value_cache)
        with graph.inserting_before(node):
            seq_lens = derived.seq_lens(site.cache_position)
            attn_mask = derived.shared_mask(site.attn_mask)
            if is_sparse:
                summary = summary_of[site.key_cache]
                quest_op = torch.ops.quest.sparse_decode.default
                state: tuple[fx.Node, ...] = (summary.page_summary,)
                if decision.updates_summary:
                    quest_op = torch.ops.quest.sparse_decode_step.default
                    state = (summary.cache_position, *state, summary.num_sealed)
                assert decision.budget is not None
                new = graph.call_function(
                    quest_op,
                    (*caches, *state, seq_lens, attn_mask),
                    {
                        **config.selection(decision.budget).as_kwargs(),
                        "scale": site.scale,
                        **config.page_format.as_kwargs(),
                    },
                )
            else:
                new = graph.call_function(
                    torch.ops.quest.dense_decode.default,
                    (*caches, seq_lens, attn_mask),
                    {"scale": site.scale},
                )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        replaced[node] = new
    erase_dead_views(graph)
    return len(replaced)


class _DerivedInputs:
    """Nodes made once and shared by all layers that ask for the same thing."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[fx.Node, fx.Node] = {}

    def seq_lens(self, cache_position: fx.Node) -> fx.Node:
        """int [1]: valid positions once ``cache_position`` is written; call at a decode site."""
        if not self._is_made(cache_position):
            last, value = cache_position, example_value(cache_position)
            if not same_size(value.shape[0], 1):
                last = self.graph.call_function(torch.amax, (cache_position, 0, True))
                last.meta["example_value"] = value = torch.amax(value, 0, True)
            node = self.graph.call_function(operator.add, (last, 1))
            node.meta["example_value"] = torch.add(value, 1)
            self.made[cache_position] = node
        return self.made[cache_position]

    def shared_mask(self, attn_mask: fx.Node | None) -> fx.Node | None:
        """The mask behind an opaque op, so that Inductor does not compute it again per layer."""
        if attn_mask is None or attn_mask.op == "placeholder":
            return attn_mask
        if not self._is_made(attn_mask):
            node = self.graph.call_function(torch.ops.quest.share_mask.default, (attn_mask,))
            node.meta["example_value"] = example_value(attn_mask)
            self.made[attn_mask] = node
        return self.made[attn_mask]

    def _is_made(self, node: fx.Node) -> bool:
        # What is written in place somewhere may differ from one layer to the next.
        return node in self.made and not is_written(node)
