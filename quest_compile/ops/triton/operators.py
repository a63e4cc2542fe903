"""The operators of ``quest_compile.ops`` on Triton kernels; arguments are checked by the caller.

A sparse step is three launches: update and score, select, attend; one more where summaries have
scales of channels. Nothing waits for the device, and every size follows from shapes, so that a CUDA
graph can hold all of it.
"""

from __future__ import annotations

from torch import Tensor

from quest_compile.ops import reference_selection
from quest_compile.ops.triton.launch import Lengths, Mask
from quest_compile.ops.triton.launch_attention import attend_rows
from quest_compile.ops.triton.launch_scaled_scoring import (
    ScaledSummary,
    score_scaled_rows,
    update_scaled,
)
from quest_compile.ops.triton.launch_scoring import Update, score_rows, update_alone
from quest_compile.ops.triton.launch_selection import fitting_pages, select_rows


def update_page_summary(
    key_cache, cache_position, page_summary, num_sealed, channel_scale=None, *, page_size=16,
    summary="minmax", sketch_bits=1
):  # fmt: skip
    update = Update(key_cache, cache_position, page_summary, num_sealed, page_size)
    _update(update, _scaled(page_summary, channel_scale, sketch_bits, page_size))


def score_pages(
    query, page_summary, seq_lens, channel_scale=None, *, page_size=16, group_reduce="sum",
    summary="minmax", sketch_bits=1, attn_mask=None, scale=None
):  # fmt: skip
    lengths = Lengths.of(seq_lens, query, None)
    scaled = _scaled(page_summary, channel_scale, sketch_bits, page_size)
    if scaled is None:
        scores = score_rows(query, page_summary, lengths, None, page_size, group_reduce)
    else:
        mask = Mask.of(attn_mask, page_summary.shape[2] * page_size)
        scores = score_scaled_rows(query, scaled, lengths, mask, None, group_reduce, scale)
    return scores.flatten(0, 1)


def select_pages(
    scores, seq_lens, attn_mask=None, *, page_budget, page_size=16, num_sink_pages=1,
    num_recent_pages=2, budget_fraction=1.0, top_p=1.0, score_scale=1.0
):  # fmt: skip
    mask = Mask.of(attn_mask, scores.shape[2] * page_size)
    lengths = Lengths(seq_lens, seq_lens.stride(0) if len(seq_lens) > 1 else 0, 0, 0)
    pages, _ = select_rows(
        scores.contiguous()[:, None], lengths, mask, page_budget, page_size, num_sink_pages,
        num_recent_pages, budget_fraction=budget_fraction, top_p=top_p, score_scale=score_scale
    )  # fmt: skip
    return pages.flatten(0, 1)


def attend_pages(
    query, key_cache, value_cache, page_indices, seq_lens, attn_mask=None, *, page_size=16,
    scale=None
):  # fmt: skip
    lengths, mask = Lengths.of(seq_lens, query, None), Mask.of(attn_mask, key_cache.shape[2])
    pages = page_indices.contiguous()[:, None]
    out, lse = attend_rows(
        query, key_cache, value_cache, lengths, mask, scale, pages, page_size, with_lse=True
    )
    return out, lse


def dense_decode(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    lengths = Lengths.of(seq_lens, query, attn_mask)
    mask = Mask.of(attn_mask, key_cache.shape[2])
    return attend_rows(query, key_cache, value_cache, lengths, mask, scale)[0]


def sparse_decode(
    query, key_cache, value_cache, page_summary, seq_lens, attn_mask=None, channel_scale=None, *,
    budget, page_size=16, num_sink_pages=1, num_recent_pages=2, group_reduce="sum",
    summary="minmax", sketch_bits=1, scale=None, budget_fraction=1.0, top_p=1.0
):  # fmt: skip
    scaled = _scaled(page_summary, channel_scale, sketch_bits, page_size)
    return _sparse_decode(
        query, key_cache, value_cache, page_summary, seq_lens, attn_mask, None, scaled, summary,
        budget, page_size, num_sink_pages, num_recent_pages, group_reduce, scale, budget_fraction,
        top_p
    )  # fmt: skip


def sparse_decode_step(
    query, key_cache, value_cache, cache_position, page_summary, num_sealed, seq_lens,
    attn_mask=None, channel_scale=None, *, budget, page_size=16, num_sink_pages=1,
    num_recent_pages=2, group_reduce="sum", summary="minmax", sketch_bits=1, scale=None,
    budget_fraction=1.0, top_p=1.0
):  # fmt: skip
    update = Update(key_cache, cache_position, page_summary, num_sealed, page_size)
    scaled = _scaled(page_summary, channel_scale, sketch_bits, page_size)
    return _sparse_decode(
        query, key_cache, value_cache, page_summary, seq_lens, attn_mask, update, scaled, summary,
        budget, page_size, num_sink_pages, num_recent_pages, group_reduce, scale, budget_fraction,
        top_p
    )  # fmt: skip


def _scaled(
    page_summary: Tensor, channel_scale: Tensor | None, sketch_bits: int, page_size: int
) -> ScaledSummary | None:  # fmt: skip
    """What summaries with scales of channels consist of; None for the others."""
    if channel_scale is None:
        return None
    return ScaledSummary(page_summary, channel_scale, sketch_bits, page_size)


def _update(update: Update, scaled: ScaledSummary | None) -> None:
    if scaled is None:
        update_alone(update)
    else:
        update_scaled(update, scaled)


def _sparse_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, page_summary: Tensor, seq_lens: Tensor,
    attn_mask: Tensor | None, update: Update | None, scaled: ScaledSummary | None, summary: str,
    budget: int, page_size: int, num_sink_pages: int, num_recent_pages: int, group_reduce: str,
    scale: float | None, budget_fraction: float, top_p: float
) -> Tensor:  # fmt: skip
    max_seq_len, page_budget = key_cache.shape[2], budget // page_size
    budget_tokens = page_size * fitting_pages(
        page_budget, num_sink_pages, num_recent_pages, budget_fraction
    )
    lengths, mask = Lengths.of(seq_lens, query, attn_mask), Mask.of(attn_mask, max_seq_len)
    if max_seq_len <= budget_tokens:
        if update is not None:
            _update(update, scaled)
        return attend_rows(query, key_cache, value_cache, lengths, mask, scale)[0]
    if scaled is None:
        scores = score_rows(
            query, page_summary, lengths, update, page_size, group_reduce, budget_tokens,
            max_seq_len
        )  # fmt: skip
    else:
        scores = score_scaled_rows(
            query, scaled, lengths, mask, update, group_reduce, scale, budget_tokens, max_seq_len
        )  # fmt: skip
    is_per_query_head = scores.shape[2] > key_cache.shape[1]
    num_lists = query.shape[1] if is_per_query_head or mask.num_heads > 1 else key_cache.shape[1]
    # What the first launches of scaled summaries leave to no later one.
    unfinished = update if scaled is None else None
    pages, counters = select_rows(
        scores, lengths, mask, page_budget, page_size, num_sink_pages, num_recent_pages,
        budget_tokens=budget_tokens, max_seq_len=max_seq_len, update=unfinished,
        num_counters=num_lists, budget_fraction=budget_fraction, top_p=top_p,
        score_scale=reference_selection.score_scale_of(
            query.shape[1] // key_cache.shape[1], query.shape[3], group_reduce=group_reduce,
            summary=summary, scale=scale
        )
    )  # fmt: skip
    return attend_rows(
        query, key_cache, value_cache, lengths, mask, scale, pages, page_size, budget_tokens,
        counters
    )[0]  # fmt: skip
