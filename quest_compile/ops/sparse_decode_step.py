"""What a decode step does after the write to the cache, in one operator:

    update_page_summary(key_cache, cache_position, page_summary, num_sealed)
    out = sparse_decode(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, ...)

with the same bits, so that a GPU needs fewer launches.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from quest_compile.ops import reference
from quest_compile.ops.counters import count_sparse_call, count_update_call
from quest_compile.ops.operator import empty_attention, operator
from quest_compile.ops.settings import FormatSettings, SparseSettings, SummaryFormat
from quest_compile.ops.sparse_decode import SETTINGS_SCHEMA
from quest_compile.ops.sparse_decode import check as check_sparse_decode
from quest_compile.ops.update_page_summary import check as check_update


def _check(
    query,
    key_cache,
    value_cache,
    cache_position,
    page_summary,
    num_sealed,
    seq_lens,
    attn_mask=None,
    **settings,
):
    caches = (key_cache, value_cache, page_summary)
    check_sparse_decode(query, *caches, seq_lens, attn_mask, **settings)
    of_rows = {k: v for k, v in settings.items() if k in FormatSettings.__annotations__}
    check_update(key_cache, cache_position, page_summary, num_sealed, **of_rows)


def _reference(query, key_cache, value_cache, cache_position, page_summary, *rest, **settings):
    caches = (key_cache, value_cache, cache_position, page_summary)
    out, selected, updated = reference.sparse_decode_step(query, *caches, *rest, **settings)
    count_update_call(*updated)
    page_size = SummaryFormat.take(settings).page_size
    count_sparse_call(query, key_cache, value_cache, page_summary, selected, page_size)
    return out


def _fake(query, key_cache, value_cache, *rest, **settings):
    return empty_attention(query, value_cache)


_OPERATOR = operator(
    "sparse_decode_step",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_position, "
    "Tensor(a!) page_summary, Tensor(b!) num_sealed, Tensor seq_lens, Tensor? attn_mask=None, *, "
    f"{SETTINGS_SCHEMA}) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
)


def sparse_decode_step(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_position: Tensor,
    page_summary: Tensor,
    num_sealed: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    **settings: Unpack[SparseSettings],
) -> Tensor:
    """update_page_summary and then sparse_decode.

    Args:
        query, key_cache, value_cache, seq_lens, attn_mask, settings: of sparse_decode.
        cache_position: of update_page_summary: the positions that were written to the caches.
        page_summary, num_sealed: of update_page_summary, written in place.

    Returns:
        [batch, num_q_heads, q_len, value_dim] in the dtype of query.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    caches = (key_cache, value_cache, cache_position, page_summary, num_sealed)
    return _OPERATOR(query, *caches, seq_lens, attn_mask, **settings)
