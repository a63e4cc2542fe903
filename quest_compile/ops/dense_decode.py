"""Attend every position: for the dense layers and for short contexts."""

from __future__ import annotations

from torch import Tensor

from quest_compile.ops import checks, reference
from quest_compile.ops.counters import count_dense_call
from quest_compile.ops.operator import empty_attention, operator


def _check(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    checks.attention(query, key_cache, value_cache, seq_lens, attn_mask, scale)


def _reference(query, key_cache, value_cache, seq_lens, attn_mask, *, scale=None):
    count_dense_call(key_cache, value_cache, seq_lens)
    return reference.dense_decode(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)


def _fake(query, key_cache, value_cache, seq_lens, attn_mask, **settings):
    return empty_attention(query, value_cache)


_OPERATOR = operator(
    "dense_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens, "
    "Tensor? attn_mask=None, *, float? scale=None) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
)


def dense_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention over all valid positions; several queries as if each came alone.

    Args:
        query: [batch, num_q_heads, q_len, head_dim].
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous.
        value_cache: [batch, num_kv_heads, max_seq_len, value_dim], the last dimension contiguous.
        seq_lens: int32 or int64 [batch] or [1], valid positions, those of the queries included.
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, q_len, max_seq_len].
            Without one, several queries are causal: query i of q_len stands at position
            seq_len - q_len + i and attends up to it.
        scale: of query.key; 1 / sqrt(head_dim) by default.

    Returns:
        [batch, num_q_heads, q_len, value_dim] in the dtype of query; 0 where there is nothing to
        attend.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    return _OPERATOR(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
