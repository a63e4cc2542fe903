"""Give every sparse key cache its page summary: graph inputs and an update after the write."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import fx

from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.passes.decide import Decision
from quest_compile.passes.graph import example_value


@dataclasses.dataclass(frozen=True)
class SummaryInputs:
    """The inputs one key cache gained.

    ``cache_index``, ``value_cache_index``: positions of the caches among the placeholders.
    ``page_summary`` and ``num_sealed``: as update_page_summary takes them.
    ``cache_position``: int64, for the attention call that updates the summary.
    """

    cache_index: int
    value_cache_index: int
    key_cache: fx.Node
    page_summary: fx.Node
    num_sealed: fx.Node
    cache_position: fx.Node

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order of the inputs."""
        return [self.page_summary, self.num_sealed]


def add_page_summaries(
    graph: fx.Graph, decisions: list[Decision], *, config: QuestConfig
) -> list[SummaryInputs]:
    """Add the inputs behind all others, in the order returned, and update them after each write,
    unless an attention call will do that itself."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    cache_indices = {node: i for i, node in enumerate(placeholders)}
    last = placeholders[-1] if placeholders else None
    added: dict[fx.Node, SummaryInputs] = {}
    for decision in decisions:
        site = decision.call.site
        if not decision.needs_summary or site is None or site.key_cache in added:
            continue
        nodes: dict[str, fx.Node] = {}
        for name, value in _empty_state(decision, config).items():
            nodes[name] = last = add_static_input(graph, last, f"quest_{len(added)}_{name}", value)
        with graph.inserting_before(site.key_write.next):
            cache_position = site.cache_position
            if example_value(cache_position).dtype != torch.int64:
                cache_position = graph.call_method("long", (cache_position,))
            inputs = SummaryInputs(
                cache_indices[site.key_cache],
                cache_indices[site.value_cache],
                site.key_cache,
                nodes["page_summary"],
                nodes["num_sealed"],
                cache_position,
            )
            if not decision.updates_summary:
                graph.call_function(
                    torch.ops.quest.update_page_summary.default,
                    (site.key_cache, cache_position, *inputs.nodes),
                    config.page_format.as_kwargs(),
                )
        added[site.key_cache] = inputs
    return list(added.values())


def _empty_state(decision: Decision, config: QuestConfig) -> dict[str, torch.Tensor]:
    """Fakes of the state of the (fake) key cache of this call."""
    assert decision.call.site is not None
    key_cache = example_value(decision.call.site.key_cache)
    with getattr(key_cache, "fake_mode", None) or contextlib.nullcontext():
        page_summary = ops.empty_page_summary(key_cache, **config.page_format.as_kwargs())
        num_sealed = key_cache.new_zeros(2, dtype=torch.int64)
    return {"page_summary": page_summary, "num_sealed": num_sealed}


def add_static_input(
    graph: fx.Graph, last: fx.Node | None, name: str, value: torch.Tensor
) -> fx.Node:
    """A placeholder that Dynamo, AOT Autograd and CUDA graphs take for a fixed-address buffer."""
    with graph.inserting_after(last):
        placeholder = graph.placeholder(name)
    placeholder.meta["example_value"] = value
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    placeholder._dynamo_source = None
    return placeholder
