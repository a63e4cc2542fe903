"""Find every attention call of a Dynamo graph and say whether it reads a static KV cache.

Decoding with a static cache looks like this in every model, whatever surrounds it:

    key_cache.index_copy_(2, position, key)          # or key_cache[:, :, position] = key
    keys = key_cache[:, :, None].expand(...).reshape(...)   # or repeat_interleave, or nothing
    scaled_dot_product_attention(query, keys, values, attn_mask=mask)

A call that has this shape is a *site*: it can be rewritten. Nothing is changed here.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import re
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from quest_compile.ops.limits import DTYPES, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from quest_compile.passes.graph import (
    aliased_placeholder,
    call_name,
    example_value,
    is_inplace_call,
    is_plain_tensor,
    same_tensor,
    source_line,
)

SDPA = torch.nn.functional.scaled_dot_product_attention
_SDPA_PARAMETERS = "query key value attn_mask dropout_p is_causal scale enable_gqa".split()
_EVERYTHING = slice(None, None, None)
_IDENTITIES = frozenset({"contiguous", "detach"})
_HEAD_REPEATS = frozenset(
    {"getitem", "unsqueeze", "expand", "reshape", "view", "flatten", "repeat_interleave"}
)
_ALLOCATIONS = frozenset({"zeros", "new_zeros", "zeros_like", "empty", "new_empty", "full"})


class Reason(enum.Enum):
    """Why an attention call was treated as it was."""

    SPARSE = "reads only the selected pages"
    DENSE_LAYER = "one of the first num_dense_layers layers"
    BUDGET_COVERS_CACHE = "the budget covers the whole cache"
    PREFILL = "several queries at once: attends everything, page summaries kept up to date"
    NOT_A_CACHE = "keys or values do not come from a static cache (DynamicCache, MLA, or none)"
    CACHE_CREATED_IN_GRAPH = "the cache is created inside this graph (first call of a new cache)"
    NO_CACHE_WRITE = "nothing is written to this cache here (cross attention)"
    UNKNOWN_CACHE_WRITE = "the cache is written in a way that is not known (sliding window, rolling)"
    SEVERAL_CACHE_WRITES = "the cache is written more than once"
    READ_BEFORE_WRITE = "the cache is read before the new keys are written"
    UNKNOWN_CACHE_READ = "the cache is read through operations that are not known (slicing)"
    KEY_VALUE_MISMATCH = "key and value cache differ in shape, position or number of repeats"
    HEAD_COUNTS = "the number of query heads is not a multiple of the number of KV heads"
    HEAD_DIM = "head_dim is not a multiple of 8 up to 256"
    DTYPE = "dtype is not float32, bfloat16 or float16, or differs between query and cache"
    NO_MASK = "no attention mask: the call attends unwritten positions too"
    MASK_DTYPE = "the mask is not boolean: a bias would not be seen by the page scores"
    MASK_SHAPE = "the mask is not [batch or 1, heads or 1, 1, max_seq_len]"
    IS_CAUSAL = "is_causal=True with one query attends the first key only"
    DROPOUT = "dropout is active"
    GRADIENTS = "gradients are enabled and wanted (use torch.no_grad())"
    TENSOR_SUBCLASS = "query or cache is a tensor subclass (DTensor, quantised)"


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention call over a static KV cache, as graph nodes."""

    query: fx.Node  # [B, num_q_heads, q_len, head_dim]
    key_cache: fx.Node  # placeholder [B, num_kv_heads, max_seq_len, head_dim]
    value_cache: fx.Node  # placeholder [B, num_kv_heads, max_seq_len, value_head_dim]
    key_write: fx.Node
    cache_position: fx.Node  # int64 [q_len]
    attn_mask: fx.Node | None
    scale: Any  # float, Node or None
    is_decode: bool  # q_len == 1


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """An attention call of the graph: its site, or the reason why it has none."""

    node: fx.Node
    layer: int
    source: str
    site: AttentionSite | None
    reason: Reason | None


class _Refused(Exception):
    def __init__(self, reason: Reason) -> None:
        self.reason = reason


def match_attention(graph: fx.Graph) -> list[AttentionCall]:
    """List the attention calls in graph order. Linear in the size of the graph."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    writes = _cache_writes(nodes)
    calls = []
    for node in nodes:
        if node.op != "call_function" or node.target is not SDPA:
            continue
        site, reason = None, None
        try:
            site = _match_site(node, writes, order)
        except _Refused as refused:
            reason = refused.reason
        layer = _layer_of(site, default=len(calls))
        calls.append(AttentionCall(node, layer, source_line(node), site, reason))
    return calls


def _cache_writes(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Every in-place call on (a view of) a placeholder, by placeholder."""
    writes = defaultdict(list)
    for node in nodes:
        if not is_inplace_call(node):
            continue
        for argument in node.all_input_nodes if call_name(node) == "" else node.args[:1]:
            placeholder = aliased_placeholder(argument)
            if placeholder is not None:
                writes[placeholder].append(node)
    return writes


def _match_site(
    node: fx.Node, writes: dict[fx.Node, list[fx.Node]], order: dict[fx.Node, int]
) -> AttentionSite:
    arguments = dict(zip(_SDPA_PARAMETERS, node.args)) | node.kwargs
    query = arguments["query"]
    key_cache, key_repeats, key_read = _trace_to_cache(arguments["key"])
    value_cache, value_repeats, value_read = _trace_to_cache(arguments["value"])
    key_write, key_position = _single_write(writes[key_cache])
    value_write, value_position = _single_write(writes[value_cache])
    if order[key_write] > order[key_read or node] or order[value_write] > order[value_read or node]:
        raise _Refused(Reason.READ_BEFORE_WRITE)

    query_value, key_value, value_value = map(example_value, (query, key_cache, value_cache))
    _require(
        all(map(is_plain_tensor, (query_value, key_value, value_value))), Reason.TENSOR_SUBCLASS
    )
    num_q_heads, num_kv_heads = query_value.shape[1], key_value.shape[1]
    repeats_fit = num_kv_heads * key_repeats == num_q_heads or (
        key_repeats == 1 and arguments.get("enable_gqa", False)
    )
    _require(
        key_value.shape[:3] == value_value.shape[:3]
        and key_repeats == value_repeats
        and key_position is value_position,
        Reason.KEY_VALUE_MISMATCH,
    )
    _require(num_q_heads % num_kv_heads == 0 and repeats_fit, Reason.HEAD_COUNTS)
    _require(
        query_value.dtype in DTYPES
        and query_value.dtype == key_value.dtype == value_value.dtype,
        Reason.DTYPE,
    )
    _require(_is_head_dim(key_value.shape[3]) and _is_head_dim(value_value.shape[3]), Reason.HEAD_DIM)
    wants_grad = any(v.requires_grad for v in (query_value, key_value, value_value))
    _require(not (torch.is_grad_enabled() and wants_grad), Reason.GRADIENTS)
    _require(not arguments.get("dropout_p", 0.0), Reason.DROPOUT)

    q_len = query_value.shape[2]
    is_decode = isinstance(q_len, int) and q_len == 1
    if is_decode:
        _require(not arguments.get("is_causal", False), Reason.IS_CAUSAL)
        _check_mask(example_value(arguments.get("attn_mask")), key_value.shape[2])
    return AttentionSite(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        key_write=key_write,
        cache_position=key_position,
        attn_mask=arguments.get("attn_mask"),
        scale=arguments.get("scale"),
        is_decode=is_decode,
    )


def _trace_to_cache(node: Any) -> tuple[fx.Node, int, fx.Node | None]:
    """Walk an attention operand back to a 4-D placeholder.

    Returns the placeholder, how often each KV head is repeated, and the first node of the walk.
    """
    steps: list[fx.Node] = []
    node = same_tensor(node)
    while node.op != "placeholder":
        name = call_name(node)
        if name in _ALLOCATIONS:
            raise _Refused(Reason.CACHE_CREATED_IN_GRAPH)
        if name not in _IDENTITIES | _HEAD_REPEATS or len(steps) > 3:
            raise _Refused(Reason.NOT_A_CACHE)
        if name not in _IDENTITIES:
            steps.insert(0, node)
        node = same_tensor(node.args[0])
    value = example_value(node)
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        raise _Refused(Reason.NOT_A_CACHE)
    return node, _head_repeats(steps, value), steps[0] if steps else None


def _head_repeats(steps: list[fx.Node], cache: torch.Tensor) -> int:
    """How often the known ways of spelling "repeat the KV heads" repeat them."""
    names = [call_name(step) for step in steps]
    if not names:
        return 1
    if names == ["repeat_interleave"]:
        arguments = dict(zip(("repeats", "dim"), steps[0].args[1:])) | steps[0].kwargs
        if arguments.get("dim") in (1, -3) and isinstance(arguments.get("repeats"), int):
            return arguments["repeats"]
    if len(names) == 3 and names[1] == "expand" and names[2] in ("reshape", "view", "flatten"):
        expanded, merged = example_value(steps[1]).shape, example_value(steps[2]).shape
        batch, num_kv_heads, max_seq_len, head_dim = cache.shape
        inserts_group_dim = (
            names[0] == "getitem" and _is_unsqueeze_2(steps[0].args[1])
        ) or (names[0] == "unsqueeze" and steps[0].args[1:] == (2,))
        if (
            inserts_group_dim
            and tuple(expanded[:2]) == (batch, num_kv_heads)
            and tuple(expanded[3:]) == (max_seq_len, head_dim)
            and tuple(merged) == (batch, num_kv_heads * expanded[2], max_seq_len, head_dim)
        ):
            return int(expanded[2])
    raise _Refused(Reason.UNKNOWN_CACHE_READ)


def _is_unsqueeze_2(index: Any) -> bool:
    """``[:, :, None]`` with or without trailing full slices."""
    if not isinstance(index, tuple) or len(index) < 3:
        return False
    return index[2] is None and all(
        entry == _EVERYTHING for i, entry in enumerate(index) if i != 2
    )


def _single_write(writes: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The one write of new rows at a tensor of positions: (node, positions)."""
    if not writes:
        raise _Refused(Reason.NO_CACHE_WRITE)
    if len(writes) > 1:
        raise _Refused(Reason.SEVERAL_CACHE_WRITES)
    (write,) = writes
    position = None
    if same_tensor(write.args[0]).op == "placeholder":
        if call_name(write) == "index_copy_" and write.args[1] in (2, -2):
            position = write.args[2]
        elif write.target is operator.setitem:
            position = _position_of_index(write.args[1])
        elif call_name(write) == "index_put_" and not write.kwargs and len(write.args) == 3:
            position = _position_of_index(tuple(write.args[1]))
    value = example_value(position)
    if not isinstance(value, torch.Tensor) or value.ndim != 1 or value.dtype != torch.int64:
        raise _Refused(Reason.UNKNOWN_CACHE_WRITE)
    return write, position


def _position_of_index(index: Any) -> Any:
    """``position`` of ``cache[:, :, position]``."""
    if isinstance(index, tuple) and len(index) in (3, 4):
        others = index[:2] + index[3:]
        if all(entry == _EVERYTHING or entry is None for entry in others[:2]) and all(
            entry in (_EVERYTHING, Ellipsis) for entry in others[2:]
        ):
            return index[2]
    return None


def _check_mask(mask: Any, max_seq_len: Any) -> None:
    _require(mask is not None, Reason.NO_MASK)
    _require(mask.dtype == torch.bool, Reason.MASK_DTYPE)
    _require(mask.ndim == 4 and mask.shape[2] == 1 and mask.shape[3] == max_seq_len, Reason.MASK_SHAPE)


def _is_head_dim(size: Any) -> bool:
    return isinstance(size, int) and size % HEAD_DIM_MULTIPLE == 0 and 0 < size <= MAX_HEAD_DIM


def _require(condition: Any, reason: Reason) -> None:
    if not condition:
        raise _Refused(reason)


def _layer_of(site: AttentionSite | None, default: int) -> int:
    """The layer number in the cache's source (``...layers[3].keys``), else ``default``.

    Counting calls is wrong where a graph break splits the model or layers have no attention.
    """
    if site is not None:
        source = getattr(site.key_cache, "_dynamo_source", None)
        name = getattr(source, "name", "")
        numbers = re.findall(r"layers\D{1,24}?(\d+)", name() if callable(name) else name)
        if len(numbers) == 1:
            return int(numbers[0])
    return default
