"""Attend the positions of the selected pages only."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, reference, require
from quest_compile.ops.operator import empty_attention, operator
from quest_compile.ops.settings import SummaryFormat


def _check(
    query,
    key_cache,
    value_cache,
    page_indices,
    seq_lens,
    attn_mask=None,
    *,
    page_size=16,
    scale=None,
):
    require.tensors(page_indices=page_indices)
    SummaryFormat(page_size=page_size)
    tensors = (query, key_cache, value_cache, seq_lens, attn_mask)
    checks.attention(*tensors, scale, takes_several=False)
    layout = "[batch, num_kv_heads or num_q_heads, page_budget]"
    require.rank("page_indices", page_indices, 3, layout)
    require.dtype("page_indices", page_indices, torch.int32)
    require.device("page_indices", page_indices, query)
    batch, num_q_heads, num_kv_heads = query.shape[0], query.shape[1], key_cache.shape[1]
    is_per_query_head = page_indices.shape[1] == num_q_heads
    expected = (batch, num_q_heads if is_per_query_head else num_kv_heads, page_indices.shape[2])
    require.shape("page_indices", page_indices, expected, layout)


def _fake(query, key_cache, value_cache, page_indices, seq_lens, attn_mask, **settings):
    lse = query.new_empty(*query.shape[:2], 1, dtype=torch.float32)
    return empty_attention(query, value_cache), lse


_OPERATOR = operator(
    "attend_pages",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_indices, Tensor seq_lens, "
    "Tensor? attn_mask=None, *, int page_size=16, float? scale=None) -> (Tensor, Tensor)",
    check=_check,
    reference=reference.attend_pages,
    fake=_fake,
)


def attend_pages(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_indices: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    *,
    page_size: int = 16,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row over the listed pages.

    Args:
        query: [batch, num_q_heads, 1, head_dim].
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous.
        value_cache: [batch, num_kv_heads, max_seq_len, value_dim], the last dimension contiguous.
        page_indices: int32 [batch, num_kv_heads, page_budget], shared by the query heads of a KV
            head, or [batch, num_q_heads, page_budget]; pages that are negative or not in use are
            skipped.
        seq_lens: int32 or int64 [batch] or [1], valid positions, the current token included.
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, 1, max_seq_len].
        page_size: positions per page.
        scale: of query.key; 1 / sqrt(head_dim) by default.

    Returns:
        out [batch, num_q_heads, 1, value_dim] in the dtype of query, and lse float32
        [batch, num_q_heads, 1], the natural logarithm of the softmax denominator. A query head
        with nothing to attend has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    tensors = (query, key_cache, value_cache, page_indices, seq_lens, attn_mask)
    return _OPERATOR(*tensors, page_size=page_size, scale=scale)
