"""Find what quest::dense_prefill can take of an attention call: many queries, whatever the cache.

Keys and values may be a static cache, one that is made in the graph, or anything else: they are
taken as they are at the call, but for the repetition of their heads, which the operator does by
itself. What a query attends is what the call says, by ``attn_mask`` or ``is_causal``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from quest_compile.passes.attention_arguments import (
    arguments_by_name,
    check_arguments,
    check_mask,
)
from quest_compile.passes.cache_access import single_write, skip_head_repeats
from quest_compile.passes.graph import example_value, is_written_between
from quest_compile.passes.reasons import Reason, Refused, require


@dataclasses.dataclass(frozen=True)
class PrefillSite:
    """An attention call that quest::dense_prefill can take, as graph nodes."""

    query: fx.Node  # [B, num_q_heads, q_len, head_dim]
    keys: fx.Node  # [B, num_kv_heads, num_keys, head_dim]
    values: fx.Node  # [B, num_kv_heads, num_keys, value_head_dim]
    written: fx.Node | None  # the positions just written to the keys, where that is known
    attn_mask: fx.Node | None  # None: is_causal
    scale: Any  # float, Node or None
    q_len: Any  # int or SymInt


def match_prefill(node: fx.Node, order: dict[fx.Node, int]) -> PrefillSite:
    """``order``: of all nodes of the graph.

    Raises:
        Refused: the operator cannot take the call, and why.
    """
    arguments = arguments_by_name(node)
    query, mask = arguments["query"], arguments.get("attn_mask")
    keys, key_repeats, key_read = skip_head_repeats(arguments["key"])
    values, value_repeats, value_read = skip_head_repeats(arguments["value"])
    require(key_repeats == value_repeats, Reason.KEY_VALUE_MISMATCH)
    tensors = [example_value(n) for n in (query, keys, values)]
    check_arguments(arguments, *tensors, example_value(node), key_repeats)
    q_len, num_keys = tensors[0].shape[2], tensors[1].shape[2]
    if mask is None:
        require(arguments.get("is_causal", False), Reason.NO_MASK)
        # Query i attends the keys up to i, wherever it stands.
        require(guard_or_false(q_len <= num_keys), Reason.IS_CAUSAL)
    else:
        check_mask(example_value(mask), q_len, num_keys)
    for source, read in ((keys, key_read), (values, value_read)):
        is_stale = is_written_between(source, read or node, node, order)
        require(not is_stale, Reason.READ_BEFORE_WRITE)
    written = None if mask is None else _positions_written(keys)
    return PrefillSite(query, keys, values, written, mask, arguments.get("scale"), q_len)


def _positions_written(keys: fx.Node) -> fx.Node | None:
    try:
        return single_write(keys)[1]
    except Refused:
        return None
