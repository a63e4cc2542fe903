"""Put quest::linear_decode where a graph on a CPU has linear layers of a few rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from quest_compile import ops
from quest_compile.config import QuestConfig
from quest_compile.passes.graph import example_value
from quest_compile.passes.match_linear import LinearLayer, match_linear
from quest_compile.passes.reasons import LinearReason


@dataclasses.dataclass(frozen=True)
class LinearLayers:
    """What became of the linear layers of a graph.

    ``num_replaced``: by quest::linear_decode; ``weight_bytes``: that those read in a step.
    ``left``: to torch, and why.
    """

    num_replaced: int = 0
    weight_bytes: int = 0
    left: Mapping[LinearReason, int] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        left = {reason.name: count for reason, count in self.left.items()}
        return {"replaced": self.num_replaced, "weight_bytes": self.weight_bytes, "left": left}


def replace_linear(graph: fx.Graph, *, config: QuestConfig) -> LinearLayers:
    """Rewrite the linear layers in place."""
    if config.linear == "torch" or not ops.native_status().loaded:
        return LinearLayers()
    num_replaced, weight_bytes = 0, 0
    left: dict[LinearReason, int] = {}
    # The input of one may be the output of another.
    made: dict[fx.Node, fx.Node] = {}
    for layer in list(match_linear(graph)):
        if layer.reason is not None:
            left[layer.reason] = left.get(layer.reason, 0) + 1
            continue
        made[layer.node] = _replace(graph, layer, made.get(layer.x, layer.x))
        num_replaced += 1
        weight_bytes += int(example_value(layer.weight).nbytes)
    return LinearLayers(num_replaced, weight_bytes, left)


def _replace(graph: fx.Graph, layer: LinearLayer, x: fx.Node) -> fx.Node:
    node, weight = layer.node, layer.weight
    with graph.inserting_before(node):
        if layer.is_transposed:
            weight = graph.call_method("t", (weight,))
            weight.meta["example_value"] = example_value(layer.weight).t()
        bias = () if layer.bias is None else (layer.bias,)
        new = graph.call_function(torch.ops.quest.linear_decode.default, (x, weight, *bias))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
