"""Quest decoding, the operator of users. For rows that do not fit the budget it is

    scores = score_pages(query, page_summary, seq_lens)  # sketches: attn_mask, scale too
    page_indices = select_pages(scores, seq_lens, attn_mask, page_budget=budget // page_size)
    out, lse = attend_pages(query, key_cache, value_cache, page_indices, seq_lens, attn_mask)

and for the others, which would select every page, dense_decode(query, key_cache, value_cache, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, reference, registration, require, summary_checks
from quest_compile.ops.checked_call import checked_call
from quest_compile.ops.counters import count_sparse_call
from quest_compile.ops.native import announce_reference

registration.define(
    "sparse_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_summary, Tensor seq_lens, "
    "Tensor? attn_mask=None, Tensor? channel_scale=None, *, int budget, int page_size=16, "
    'int num_sink_pages=1, int num_recent_pages=2, str group_reduce="sum", str summary="minmax", '
    "int sketch_bits=1, float? scale=None, float budget_fraction=1.0, float top_p=1.0) -> Tensor",
)


def _check(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask,
    channel_scale,
    *,
    budget,
    page_size=16,
    num_sink_pages=1,
    num_recent_pages=2,
    group_reduce="sum",
    summary="minmax",
    sketch_bits=1,
    scale=None,
    budget_fraction=1.0,
    top_p=1.0,
):
    checks.page_size(page_size)
    checks.group_reduce(group_reduce)
    require.integer("budget", budget, 1)
    checks.page_budget("budget", budget // page_size, num_sink_pages, num_recent_pages)
    checks.share("budget_fraction", budget_fraction)
    checks.share("top_p", top_p)
    checks.attention(query, key_cache, value_cache, seq_lens, attn_mask, scale)
    summary_checks.page_summary_of(
        page_summary, channel_scale, summary, key_cache, page_size, sketch_bits
    )


@registration.reference("sparse_decode")
def _sparse_decode_reference(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask=None,
    channel_scale=None,
    **settings,
):
    arguments = (query, key_cache, value_cache, page_summary, seq_lens, attn_mask, channel_scale)
    _check(*arguments, **settings)
    announce_reference(query)
    out, selected = reference.sparse_decode(*arguments, **settings)
    count_sparse_call(
        query, key_cache, value_cache, page_summary, selected, settings.get("page_size", 16)
    )
    return out


@registration.fake("sparse_decode")
def _sparse_decode_fake(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask=None,
    channel_scale=None,
    **settings,
):
    arguments = (query, key_cache, value_cache, page_summary, seq_lens, attn_mask, channel_scale)
    _check(*arguments, **settings)
    batch, num_q_heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, num_q_heads, value_cache.shape[3])
    return out.transpose(1, 2)


_sparse_decode = torch.ops.quest.sparse_decode.default


def sparse_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_summary: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    channel_scale: Tensor | None = None,
    *,
    budget: int,
    page_size: int = 16,
    num_sink_pages: int = 1,
    num_recent_pages: int = 2,
    group_reduce: str = "sum",
    summary: str = "minmax",
    sketch_bits: int = 1,
    scale: float | None = None,
    budget_fraction: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """Attention of each query over the pages that matter for it (arXiv 2406.10774).

    Several queries are treated as if each came alone: it selects its own pages. The numbers of
    pages are those of select_pages.

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
        channel_scale: float32, what update_page_summary wrote, with summary="sketch"; else none.
        budget: tokens that a query attends at most, the open page included; rounded down to pages.
            A row of at most that many tokens gets the result of dense_decode, bit for bit.
        page_size: positions per page.
        group_reduce: over the query heads that share a KV head: "sum" or "max" of their page
            scores, or "none": every query head selects for itself.
        summary: what page_summary holds, "minmax" or "sketch".
        sketch_bits: 1 or 2, with summary="sketch".
        scale: of query.key; 1 / sqrt(head_dim) by default.
        budget_fraction: above 0 and up to 1: a row attends at most this share of its pages in use,
            rounded up, but no less than the sinks, the recents and one more page. A row that has no
            more pages than that is dense as well.
        top_p: above 0 and below 1: of the pages that are not sinks or recents only the best, until
            those have this share of the softmax over the page scores; budget caps them. 1: budget
            alone decides.

    Returns:
        [batch, num_q_heads, q_len, value_dim] in the dtype of query.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    arguments = (query, key_cache, value_cache, page_summary, seq_lens, attn_mask, channel_scale)
    settings = {
        "budget": budget,
        "page_size": page_size,
        "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages,
        "group_reduce": group_reduce,
        "summary": summary,
        "sketch_bits": sketch_bits,
        "scale": scale,
        "budget_fraction": budget_fraction,
        "top_p": top_p,
    }
    return checked_call(_sparse_decode, _check, arguments, settings)
