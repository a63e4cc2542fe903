"""Find every attention call of a Dynamo graph and say whether it reads a static KV cache.

Decoding with a static cache looks like this in every model, whatever surrounds it:

    key_cache.index_copy_(2, position, key)          # or key_cache[:, :, position] = key
    keys = key_cache[:, :, None].expand(...).reshape(...)   # or repeat_interleave, or nothing
    scaled_dot_product_attention(query, keys, values, attn_mask=mask)

A call that has this shape is a *site*: it can be rewritten. Nothing is changed here.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import fx

from quest_compile.passes.attention_arguments import (
    SDPA,
    arguments_by_name,
    check_arguments,
    check_mask,
)
from quest_compile.passes.cache_access import single_write, trace_to_cache
from quest_compile.passes.graph import example_value, same_size, source_line
from quest_compile.passes.match_prefill import PrefillSite, match_prefill
from quest_compile.passes.reasons import Reason, Refused, require


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention call over a static KV cache, as graph nodes."""

    query: fx.Node  # [B, num_q_heads, q_len, head_dim]
    key_cache: fx.Node  # placeholder [B, num_kv_heads, max_seq_len, head_dim]
    value_cache: fx.Node  # placeholder [B, num_kv_heads, max_seq_len, value_head_dim]
    key_write: fx.Node
    cache_position: fx.Node  # int64 or int32 [q_len]
    attn_mask: fx.Node | None
    scale: Any  # float, Node or None
    q_len: Any  # int or SymInt
    unfit: Reason | None  # why the operators cannot take it, if they cannot


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """An attention call of the graph: its site, or the reason why it has none.

    ``prefill``: as what quest::dense_prefill could take it, if it has many queries.
    """

    node: fx.Node
    layer: int | None  # None: nothing in the graph says which
    source: str
    queries: int | str
    site: AttentionSite | None
    reason: Reason | None
    prefill: PrefillSite | None = None


def match_attention(graph: fx.Graph, *, prefill: bool = True) -> list[AttentionCall]:
    """List the attention calls in graph order. Linear in the size of the graph.

    ``prefill``: look for what dense_prefill can take, too; questions about sizes become guards.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    calls: list[AttentionCall] = []
    seen: set[fx.Node] = set()
    for node in nodes:
        if node.op != "call_function" or node.target is not SDPA:
            continue
        site, reason = None, None
        try:
            site = _match_site(node, order)
        except Refused as refused:
            reason = refused.reason
        layer = _layer_of_module(node)
        if site is not None and site.key_cache not in seen:
            # A later layer may read the cache of an earlier one.
            seen.add(site.key_cache)
            layer = _layer_of_caches(site, default=layer)
        source, queries = source_line(node), _num_queries(node)
        many = _match_prefill(node, order) if prefill else None
        calls.append(AttentionCall(node, layer, source, queries, site, reason, many))
    return calls


def _match_prefill(node: fx.Node, order: dict[fx.Node, int]) -> PrefillSite | None:
    try:
        # Of one query Dynamo knows, and most graphs have no more.
        return None if _num_queries(node) == 1 else match_prefill(node, order)
    except Refused:
        return None


def _match_site(node: fx.Node, order: dict[fx.Node, int]) -> AttentionSite:
    arguments = arguments_by_name(node)
    query = arguments["query"]
    key_cache, key_repeats, key_read = trace_to_cache(arguments["key"])
    value_cache, value_repeats, value_read = trace_to_cache(arguments["value"])
    key_write, key_position = single_write(key_cache)
    value_write, value_position = single_write(value_cache)
    if order[key_write] > order[key_read or node] or order[value_write] > order[value_read or node]:
        raise Refused(Reason.READ_BEFORE_WRITE)

    require(
        key_repeats == value_repeats and key_position is value_position, Reason.KEY_VALUE_MISMATCH
    )
    tensors = [example_value(n) for n in (query, key_cache, value_cache)]
    check_arguments(arguments, *tensors, example_value(node), key_repeats)
    num_written = example_value(key_position).shape[0]
    require(num_written == tensors[0].shape[2], Reason.UNKNOWN_POSITION)
    q_len = tensors[0].shape[2]
    unfit = _why_not_decodable(arguments, q_len, max_seq_len=tensors[1].shape[2])
    require(unfit is None or not same_size(q_len, 1), unfit)
    return AttentionSite(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        key_write=key_write,
        cache_position=key_position,
        attn_mask=arguments.get("attn_mask"),
        scale=arguments.get("scale"),
        q_len=q_len,
        unfit=unfit,
    )


def _why_not_decodable(arguments: dict[str, Any], q_len: Any, max_seq_len: Any) -> Reason | None:
    mask = example_value(arguments.get("attn_mask"))
    if arguments.get("is_causal", False):
        return Reason.IS_CAUSAL
    if mask is None:
        return Reason.NO_MASK
    try:
        check_mask(mask, q_len, max_seq_len)
    except Refused as refused:
        return refused.reason
    return None


def _num_queries(node: fx.Node) -> int | str:
    """Of an attention call: a number, or the name of a symbol."""
    size = example_value(node).shape[-2]
    return size if isinstance(size, int) else str(size)


def _layer_of_caches(site: AttentionSite, default: int | None) -> int | None:
    """The layer number in the sources of its caches (``...layers[3].keys``), else ``default``.

    Counting calls is wrong: a graph may be one layer of many, or what a graph break left.
    """
    return _layer_in(_source_name(site.key_cache), _source_name(site.value_cache), default)


def _layer_of_module(node: fx.Node) -> int | None:
    """That in the path of the module that attends (``L['self'].model.layers.3.self_attn``)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return _layer_in(path, path, None)


def _layer_in(name: str, other: str, default: int | None) -> int | None:
    """``layers[3]``, or the one number that both have: ``caches[3][0]`` and ``caches[3][1]``."""
    for pattern in (r"layers\D{1,24}?(\d+)", r"[\[.]['\"]?(\d+)\b"):
        pairs = zip(re.findall(pattern, name), re.findall(pattern, other))
        numbers = [number for number, same in pairs if number == same]
        if len(numbers) == 1:
            return int(numbers[0])
    return default


def _source_name(cache: fx.Node) -> str:
    name = getattr(getattr(cache, "_dynamo_source", None), "name", "")
    name = name() if callable(name) else name
    # torch.compile(module) takes *args: the place of an argument is no layer.
    return re.sub(r"^L\['args'\]\[\d+\]", "", name)
