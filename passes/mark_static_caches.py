"""Let CUDA graphs take every KV cache for a fixed-address buffer, wherever it was created.

transformers marks the caches it creates, but cannot while Dynamo traces it: a cache created in a
compiled prefill reaches the decode graph unmarked, and Inductor skips CUDA graphs for a graph that
writes unmarked inputs. At another address a recorded graph is recorded again.
"""

from __future__ import annotations

from torch import fx

from quest_compile.passes.decide import Decision
from quest_compile.passes.graph import is_written

_MARK = "_dynamo_static_input_type"


def mark_static_caches(decisions: list[Decision]) -> int:
    """Mark the caches this graph writes and the counters of their positions; returns how many."""
    marked = 0
    for decision in decisions:
        site = decision.call.site
        if site is None:
            continue
        counters = _counters_behind(site.cache_position)
        for placeholder in (site.key_cache, site.value_cache, *counters):
            tensor_dict = placeholder.meta.get("tensor_dict") or {}
            if not tensor_dict.get(_MARK):
                # Dynamo's own graph shares this dict.
                placeholder.meta["tensor_dict"] = tensor_dict | {_MARK: "unguarded"}
                marked += 1
    return marked


def _counters_behind(cache_position: fx.Node) -> list[fx.Node]:
    """The inputs that positions are counted from and that the graph itself counts on."""
    pending, seen = [cache_position], {cache_position}
    counters: list[fx.Node] = []
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and is_written(node):
            counters.append(node)
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending += new
    return counters
