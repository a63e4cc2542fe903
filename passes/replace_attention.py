"""Put the operators of quest where scaled_dot_product_attention was."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

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
from quest_compile.passes.match_prefill import PrefillSite


def replace_attention(
    graph: fx.Graph,
    decisions: list[Decision],
    summaries: list[SummaryInputs],
    *,
    config: QuestConfig,
) -> int:
    """Rewrite the calls that an operator runs, in place; returns how many were."""
    summary_of = {inputs.key_cache: inputs for inputs in summaries}
    derived = _DerivedInputs(graph)
    replaced: dict[fx.Node, fx.Node] = {}
    for decision in decisions:
        if not decision.operator:
            continue
        node = decision.call.node
        with graph.inserting_before(node):
            if decision.operator == "dense_prefill":
                tensors, settings = _of_prefill(decision, derived)
            else:
                tensors, settings = _of_decode(decision, derived, summary_of, config)
            tensors = [replaced.get(tensor, tensor) for tensor in tensors]
            quest_op = getattr(torch.ops.quest, decision.operator).default
            new = graph.call_function(quest_op, tuple(tensors), settings)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        replaced[node] = new
    erase_dead_views(graph)
    return len(replaced)


def _of_prefill(decision: Decision, derived: _DerivedInputs) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of quest::dense_prefill."""
    site = decision.call.prefill
    assert site is not None
    positions = derived.prefill_positions(site)
    attn_mask = derived.shared_mask(site.attn_mask)
    return [site.query, site.keys, site.values, positions, attn_mask], {"scale": site.scale}


def _of_decode(
    decision: Decision,
    derived: _DerivedInputs,
    summary_of: dict[fx.Node, SummaryInputs],
    config: QuestConfig,
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of quest::dense_decode, sparse_decode or sparse_decode_step."""
    site = decision.call.site
    assert site is not None
    tensors = [site.query, site.key_cache, site.value_cache]
    settings: dict[str, Any] = {"scale": site.scale}
    seq_lens = derived.seq_lens(site.cache_position)
    attn_mask = derived.shared_mask(site.attn_mask)
    if decision.treatment is Treatment.SPARSE:
        summary = summary_of[site.key_cache]
        state = [summary.page_summary]
        if decision.updates_summary:
            state = [summary.cache_position, *state, summary.num_sealed]
        assert decision.budget is not None
        tensors += state
        selection = config.selection(decision.budget)
        settings = {**selection.as_kwargs(), **settings, **config.page_format.as_kwargs()}
    return [*tensors, seq_lens, attn_mask], settings


class _DerivedInputs:
    """Nodes made once and shared by all layers that ask for the same thing."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[fx.Node | str, str], fx.Node] = {}

    def seq_lens(self, cache_position: fx.Node) -> fx.Node:
        """int [1]: valid positions once ``cache_position`` is written; call at a decode site."""
        last = self._last(cache_position)
        return self._once(cache_position, "length", lambda: self._call(operator.add, last, 1))

    def prefill_positions(self, site: PrefillSite) -> fx.Node:
        """int64 or int32 [q_len]: up to where each query of a prefill may attend; call there.

        With a mask that is everything written: it may allow what is behind a query (an image).
        """
        query, keys = example_value(site.query), example_value(site.keys)
        q_len, num_keys = query.shape[2], keys.shape[2]
        if site.attn_mask is None:
            size = self._size(site.query)
            return self._once(f"{q_len}", "own", lambda: self._range(size, query))
        if site.written is None:
            size = self._size(site.keys)
            written = self._once(f"{num_keys}", "keys", lambda: self._range(size, query))
        else:
            written = site.written
        last, size = self._last(written), self._size(site.query)
        return self._once(written, f"expanded {q_len}", lambda: self._call("expand", last, size))

    def shared_mask(self, attn_mask: fx.Node | None) -> fx.Node | None:
        """The mask behind an opaque op, so that Inductor does not compute it again per layer."""
        if attn_mask is None or attn_mask.op == "placeholder":
            return attn_mask
        share = torch.ops.quest.share_mask.default
        return self._once(attn_mask, "shared", lambda: self._call(share, attn_mask))

    def _last(self, positions: fx.Node) -> fx.Node:
        """int [1]"""
        if same_size(example_value(positions).shape[0], 1):
            return positions
        return self._once(positions, "last", lambda: self._call(torch.amax, positions, 0, True))

    def _size(self, tensor: fx.Node) -> Any:
        """Of dimension 2: a number, or the node of a symbol."""
        size = example_value(tensor).shape[2]
        if isinstance(size, int):
            return size
        return self._once(f"{size}", "size", lambda: self._call("size", tensor, 2))

    def _range(self, size: Any, like: torch.Tensor) -> fx.Node:
        node = self.graph.call_function(torch.arange, (size,), {"device": like.device})
        number = example_value(size) if isinstance(size, fx.Node) else size
        node.meta["example_value"] = like.new_empty(number, dtype=torch.int64)
        return node

    def _call(self, target: Any, *args: Any) -> fx.Node:
        """``target``: a function, or the name of a method."""
        values = [example_value(x) if isinstance(x, fx.Node) else x for x in args]
        if isinstance(target, str):
            node = self.graph.call_method(target, args)
            node.meta["example_value"] = getattr(torch.Tensor, target)(*values)
        else:
            node = self.graph.call_function(target, args)
            node.meta["example_value"] = target(*values)
        return node

    def _once(self, source: fx.Node | str, what: str, make: Callable[[], fx.Node]) -> fx.Node:
        key = (source, what)
        # What is written in place somewhere may differ from one layer to the next.
        if key not in self.made or (isinstance(source, fx.Node) and is_written(source)):
            self.made[key] = make()
        return self.made[key]
