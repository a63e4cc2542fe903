"""Attend every position: for the dense layers and for short contexts."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, reference, registration
from quest_compile.ops.checked_call import checked_call
from quest_compile.ops.counters import count_dense_call
from quest_compile.ops.native import announce_reference

registration.define(
    "dense_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seq_lens, "
    "Tensor? attn_mask=None, *, float? scale=None) -> Tensor",
)


def _check(query, key_cache, value_cache, seq_lens, attn_mask, *, scale=None):
    checks.attention(query, key_cache, value_cache, seq_lens, attn_mask, scale)


@registration.reference("dense_decode")
def _dense_decode_reference(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    _check(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
    announce_reference(query)
    count_dense_call(key_cache, value_cache, seq_lens)
    return reference.dense_decode(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)


@registration.fake("dense_decode")
def _dense_decode_fake(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    _check(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
    batch, num_q_heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, num_q_heads, value_cache.shape[3])
    return out.transpose(1, 2)


_dense_decode = torch.ops.quest.dense_decode.default


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
    arguments = (query, key_cache, value_cache, seq_lens, attn_mask)
    return checked_call(_dense_decode, _check, arguments, {"scale": scale})
