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

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from quest_compile.ops.limits import DTYPES, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from quest_compile.passes.cache_access import single_write, trace_to_cache
from quest_compile.passes.graph import example_value, is_plain_tensor, same_size, source_line
from quest_compile.passes.reasons import Reason, Refused, require

SDPA = torch.nn.functional.scaled_dot_product_attention
_SDPA_PARAMETERS = "query key value attn_mask dropout_p is_causal scale enable_gqa".split()


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
    """An attention call of the graph: its site, or the reason why it has none."""

    node: fx.Node
    layer: int | None  # None: nothing in the graph says which
    source: str
    queries: int | str
    site: AttentionSite | None
    reason: Reason | None


def match_attention(graph: fx.Graph) -> list[AttentionCall]:
    """List the attention calls in graph order. Linear in the size of the graph."""
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
        calls.append(
            AttentionCall(node, layer, source_line(node), _num_queries(node), site, reason)
        )
    return calls


def _match_site(node: fx.Node, order: dict[fx.Node, int]) -> AttentionSite:
    arguments: dict[str, Any] = dict(zip(_SDPA_PARAMETERS, node.args)) | node.kwargs
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
    require(all(map(is_plain_tensor, tensors)), Reason.TENSOR_SUBCLASS)
    _check_tensors(*tensors)
    require(example_value(node).dtype == tensors[0].dtype, Reason.DTYPE)
    num_written = example_value(key_position).shape[0]
    require(num_written == tensors[0].shape[2], Reason.UNKNOWN_POSITION)
    num_q_heads, num_kv_heads = tensors[0].shape[1], tensors[1].shape[1]
    # One head is broadcast, more are repeated if enable_gqa says so.
    sdpa_repeats = key_repeats == 1 and (num_kv_heads == 1 or arguments.get("enable_gqa", False))
    require(num_kv_heads * key_repeats == num_q_heads or sdpa_repeats, Reason.HEAD_COUNTS)
    require(not arguments.get("dropout_p", 0.0), Reason.DROPOUT)
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


def _check_tensors(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    tensors = (query, key_cache, value_cache)
    require(key_cache.shape[:3] == value_cache.shape[:3], Reason.KEY_VALUE_MISMATCH)
    require(
        query.ndim == 4
        and query.shape[0] == key_cache.shape[0]
        and query.shape[1] % key_cache.shape[1] == 0,
        Reason.HEAD_COUNTS,
    )
    require(
        query.dtype in DTYPES and query.dtype == key_cache.dtype == value_cache.dtype, Reason.DTYPE
    )
    require(
        _is_head_dim(key_cache.shape[3]) and _is_head_dim(value_cache.shape[3]), Reason.HEAD_DIM
    )
    require(key_cache.stride(3) == value_cache.stride(3) == 1, Reason.LAYOUT)
    wants_grad = any(tensor.requires_grad for tensor in tensors)
    require(not (torch.is_grad_enabled() and wants_grad), Reason.GRADIENTS)


def _why_not_decodable(arguments: dict[str, Any], q_len: Any, max_seq_len: Any) -> Reason | None:
    mask = example_value(arguments.get("attn_mask"))
    if arguments.get("is_causal", False):
        return Reason.IS_CAUSAL
    if mask is None:
        return Reason.NO_MASK
    if mask.dtype != torch.bool:
        return Reason.MASK_DTYPE
    if (
        mask.ndim != 4
        or not (same_size(mask.shape[2], 1) or same_size(mask.shape[2], q_len))
        or not same_size(mask.shape[3], max_seq_len)
    ):
        return Reason.MASK_SHAPE
    return None


def _is_head_dim(size: Any) -> bool:
    # A symbol where models of several sizes share their code: fixed by a guard.
    if has_free_unbacked_symbols(size):
        return False
    return int(size) % HEAD_DIM_MULTIPLE == 0 and 0 < int(size) <= MAX_HEAD_DIM


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
