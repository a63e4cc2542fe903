"""Attend everything up to each of many queries: prefill, at once or in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, reference, require
from quest_compile.ops.counters import count_prefill_call
from quest_compile.ops.native import native_status
from quest_compile.ops.operator import empty_attention, operator

# Kernels that were measured against torch's attention, and in which dtypes they won: bench/notes/
# prefill.md. With AMX tiles torch has kernels of another kind.
_FASTER = {
    "cpu:avx2": (torch.float32, torch.bfloat16, torch.float16),
    "cpu:avx512_bf16": (torch.bfloat16,),
}


def _check(query, key_cache, value_cache, cache_position, attn_mask=None, *, scale=None):
    require.tensors(cache_position=cache_position)
    checks.attention_over_cache(query, key_cache, value_cache, attn_mask, scale)
    require.dtype("cache_position", cache_position, torch.int32, torch.int64)
    require.shape("cache_position", cache_position, (query.shape[2],), "[q_len]")
    require.device("cache_position", cache_position, query)
    require.values("cache_position", cache_position, 0, key_cache.shape[2] - 1)


def _reference(*tensors, scale=None):
    count_prefill_call()
    return reference.dense_prefill(*tensors, scale=scale)


def _fake(query, key_cache, value_cache, cache_position, attn_mask, **settings):
    return empty_attention(query, value_cache)


_OPERATOR = operator(
    "dense_prefill",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position, "
    "Tensor? attn_mask=None, *, float? scale=None) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    kernels=("cpu",),
)


def dense_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_position: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query over the positions up to its own, all that the mask allows.

    A query's result depends neither on the other queries of the call nor on the rest of the batch,
    so a prompt in chunks has the bits of the whole.

    Args:
        query: [batch, num_q_heads, q_len, head_dim].
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous; the
            keys of the queries are written already. What lies behind the last query is not read.
        value_cache: [batch, num_kv_heads, max_seq_len, value_dim], the last dimension contiguous.
        cache_position: int32 or int64 [q_len], the position of each query, in any order.
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, q_len, max_seq_len];
            what it allows behind the query's own position is not attended. Fastest where a query's
            positions are one interval, as with padding.
        scale: of query.key; 1 / sqrt(head_dim) by default.

    Returns:
        [batch, num_q_heads, q_len, value_dim] in the dtype of query; 0 where there is nothing to
        attend.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    tensors = (query, key_cache, value_cache, cache_position, attn_mask)
    return _OPERATOR(*tensors, scale=scale)


def has_prefill_kernel(device: str) -> bool:
    """Is there more than plain torch for dense_prefill?"""
    return device in _OPERATOR.kernels and native_status().loaded


def is_prefill_faster(device: str, dtype: torch.dtype) -> bool:
    """Is dense_prefill known to be faster than scaled_dot_product_attention here?"""
    kernels = native_status().info.split()[0]
    return (
        has_prefill_kernel(device)
        and dtype in _FASTER.get(kernels, ())
        and not torch.cpu._is_amx_tile_supported()
    )
