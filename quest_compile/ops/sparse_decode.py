"""Quest decoding, the operator of users. For rows that do not fit the budget it is

    scores = score_pages(query, page_summary, seq_lens)  # sketches, softmax: attn_mask, scale too
    page_indices = select_pages(scores, seq_lens, attn_mask, page_budget=budget // page_size)
    out, lse = attend_pages(query, key_cache, value_cache, page_indices, seq_lens, attn_mask)

and for the others, which would select every page, dense_decode(query, key_cache, value_cache, ...).
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from quest_compile.ops import checks, reference
from quest_compile.ops.counters import count_sparse_call
from quest_compile.ops.operator import empty_attention, operator
from quest_compile.ops.settings import Selection, SparseSettings, SummaryFormat, take_sparse

SETTINGS_SCHEMA = f"{Selection.schema()}, float? scale=None, {SummaryFormat.schema()}"


def check(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask=None,
    *,
    scale=None,
    **settings,
):
    _, page_format = take_sparse(settings)
    checks.attention(query, key_cache, value_cache, seq_lens, attn_mask, scale)
    checks.page_summary_of(page_summary, page_format, key_cache)


def _reference(query, key_cache, value_cache, page_summary, seq_lens, attn_mask, **settings):
    caches = (key_cache, value_cache, page_summary)
    out, selected = reference.sparse_decode(query, *caches, seq_lens, attn_mask, **settings)
    count_sparse_call(query, *caches, selected, SummaryFormat.take(settings).page_size)
    return out


def _fake(query, key_cache, value_cache, *rest, **settings):
    return empty_attention(query, value_cache)


_OPERATOR = operator(
    "sparse_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary, Tensor seq_lens, "
    f"Tensor? attn_mask=None, *, {SETTINGS_SCHEMA}) -> Tensor",
    check=check,
    reference=_reference,
    fake=_fake,
)


def sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_summary: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    **settings: Unpack[SparseSettings],
) -> Tensor:
    """Attention of each query over the pages that matter for it (arXiv 2406.10774).

    Several queries are treated as if each came alone: it selects its own pages.

    Args:
        query: [batch, num_q_heads, q_len, head_dim].
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous.
        value_cache: [batch, num_kv_heads, max_seq_len, value_dim], the last dimension contiguous.
        page_summary: [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of the keys,
            minimum and maximum of the keys of each page, or with summary="sketch" uint8 [batch,
            num_kv_heads, num_pages, bytes_per_page]; only complete pages are read.
        seq_lens: int32 or int64 [batch] or [1], valid positions, those of the queries included.
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, q_len, max_seq_len].
            Without one, several queries are causal: query i of q_len stands at position
            seq_len - q_len + i and attends up to it.
        settings: those of Selection, of which budget has to be given, and of SummaryFormat;
            scale: of query.key, 1 / sqrt(head_dim) by default.

    Returns:
        [batch, num_q_heads, q_len, value_dim] in the dtype of query.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    tensors = (query, key_cache, value_cache, page_summary, seq_lens, attn_mask)
    return _OPERATOR(*tensors, **settings)
