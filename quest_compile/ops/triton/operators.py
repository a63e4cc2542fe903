"""The operators of ``quest_compile.ops`` on Triton kernels; arguments are checked by the caller.

A sparse step is three launches: update and score, select, attend. Nothing waits for the device, and
every size follows from shapes, so that a CUDA graph can hold all of it.
"""

from __future__ import annotations

from torch import Tensor

from quest_compile.ops.reference import score_scale_of
from quest_compile.ops.settings import Selection, SummaryFormat, take_sparse
from quest_compile.ops.triton.launch import Lengths, Mask, Queries
from quest_compile.ops.triton.launch_attention import attend_rows
from quest_compile.ops.triton.launch_scoring import Update, join_rows, score_rows, update_alone
from quest_compile.ops.triton.launch_selection import fitting_pages, select_rows


def update_page_summary(key_cache, cache_position, page_summary, num_sealed, **settings):
    page_format = SummaryFormat(**settings)
    update_alone(Update(key_cache, cache_position, page_summary, num_sealed, page_format))


def score_pages(
    query, page_summary, seq_lens, attn_mask=None, *, group_reduce=Selection.group_reduce,
    scale=None, **settings
):  # fmt: skip
    page_format = SummaryFormat(**settings)
    num_kv_heads, num_pages = page_summary.shape[1:3]
    queries = Queries.of(query, seq_lens, attn_mask, num_pages * page_format.page_size)
    scores = score_rows(query, queries, page_summary, None, page_format, group_reduce, scale)
    if group_reduce == "softmax":
        scores = join_rows(scores, num_kv_heads)
    return scores.flatten(0, 1)


def select_pages(
    scores, seq_lens, attn_mask=None, *, page_budget, page_size=16, score_scale=1.0, **limits
):
    selection, max_seq_len = (
        Selection(page_budget * page_size, **limits),
        scores.shape[2] * page_size,
    )
    lengths = Lengths(seq_lens, seq_lens.stride(0) if len(seq_lens) > 1 else 0, 0, 0)
    queries = Queries(lengths, Mask.of(attn_mask, max_seq_len), max_seq_len)
    scores = scores.contiguous()[:, None]
    return select_rows(scores, queries, selection, page_size, score_scale)[0].flatten(0, 1)


def attend_pages(
    query, key_cache, value_cache, page_indices, seq_lens, attn_mask=None, *, page_size=16,
    scale=None
):  # fmt: skip
    queries = Queries.of(query, seq_lens, attn_mask, key_cache.shape[2])
    pages = page_indices.contiguous()[:, None]
    return attend_rows(
        query, queries, key_cache, value_cache, scale, pages, page_size, with_lse=True
    )


def dense_decode(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    queries = Queries.of(query, seq_lens, attn_mask, key_cache.shape[2])
    return attend_rows(query, queries, key_cache, value_cache, scale)[0]


def sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask=None, *, scale=None, **settings
):
    selection, page_format = take_sparse(settings)
    tensors = (query, key_cache, value_cache, page_summary, seq_lens, attn_mask)
    return _sparse_decode(*tensors, None, selection, page_format, scale)


def sparse_decode_step(
    query, key_cache, value_cache, cache_position, page_summary, num_sealed, seq_lens,
    attn_mask=None, *, scale=None, **settings
):  # fmt: skip
    selection, page_format = take_sparse(settings)
    update = Update(key_cache, cache_position, page_summary, num_sealed, page_format)
    tensors = (query, key_cache, value_cache, page_summary, seq_lens, attn_mask)
    return _sparse_decode(*tensors, update, selection, page_format, scale)


def _sparse_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, page_summary: Tensor, seq_lens: Tensor,
    attn_mask: Tensor | None, update: Update | None, selection: Selection,
    page_format: SummaryFormat, scale: float | None
) -> Tensor:  # fmt: skip
    (num_kv_heads, max_seq_len), num_q_heads = key_cache.shape[1:3], query.shape[1]
    page_size, group_reduce = page_format.page_size, selection.group_reduce
    budget_tokens = page_size * fitting_pages(selection, page_size)
    queries = Queries.of(query, seq_lens, attn_mask, max_seq_len, budget_tokens)
    if max_seq_len <= budget_tokens:
        if update is not None:
            update_alone(update)
        return attend_rows(query, queries, key_cache, value_cache, scale)[0]
    scores = score_rows(query, queries, page_summary, update, page_format, group_reduce, scale)
    group_size = num_q_heads // num_kv_heads
    is_per_query_head = group_reduce == "none" or queries.mask.num_heads > 1
    pages, counters = select_rows(
        scores, queries, selection, page_size,
        score_scale_of(
            group_size, query.shape[3], group_reduce=group_reduce, summary=page_format.summary,
            scale=scale
        ),
        joined=group_size if group_reduce == "softmax" else 0, update=update,
        num_counters=num_q_heads if is_per_query_head else num_kv_heads,
    )  # fmt: skip
    return attend_rows(query, queries, key_cache, value_cache, scale, pages, page_size, counters)[0]
