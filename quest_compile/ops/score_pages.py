"""Score every complete page: an upper bound of query.key over its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, reference, registration, require
from quest_compile.ops.native import announce_reference

registration.define(
    "score_pages",
    "(Tensor query, Tensor page_summary, Tensor seq_lens, Tensor? channel_scale=None, *, "
    'int page_size=16, str group_reduce="sum", str summary="minmax") -> Tensor',
)


def _check(
    query,
    page_summary,
    seq_lens,
    channel_scale=None,
    *,
    page_size=16,
    group_reduce="sum",
    summary="minmax",
):
    require.tensors(query=query, page_summary=page_summary, seq_lens=seq_lens)
    checks.page_size(page_size)
    checks.group_reduce(group_reduce)
    checks.summary_kind(summary)
    is_minmax = summary == "minmax"
    row = "2, head_dim" if is_minmax else "bytes_per_page"
    layout = f"[batch, num_kv_heads, num_pages, {row}]"
    require.rank("page_summary", page_summary, 5 if is_minmax else 4, layout)
    num_kv_heads, num_pages = page_summary.shape[1:3]
    checks.query(query, num_kv_heads, takes_several=False)
    sizes = (query.shape[0], num_kv_heads, num_pages, query.shape[3])
    checks.page_summary(page_summary, channel_scale, summary, query, sizes)
    checks.seq_lens(seq_lens, query, num_pages * page_size)


@registration.reference("score_pages")
def _score_pages_reference(query, page_summary, seq_lens, channel_scale=None, **settings):
    arguments = (query, page_summary, seq_lens, channel_scale)
    _check(*arguments, **settings)
    announce_reference(query)
    return reference.score_pages(*arguments, **settings)


@registration.fake("score_pages")
def _score_pages_fake(
    query, page_summary, seq_lens, channel_scale=None, *, group_reduce="sum", **settings
):
    _check(query, page_summary, seq_lens, channel_scale, group_reduce=group_reduce, **settings)
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    num_select_heads = query.shape[1] if group_reduce == "none" else num_kv_heads
    return query.new_empty(batch, num_select_heads, num_pages, dtype=torch.float32)


_score_pages = torch.ops.quest.score_pages.default


def score_pages(
    query: Tensor,
    page_summary: Tensor,
    seq_lens: Tensor,
    channel_scale: Tensor | None = None,
    *,
    page_size: int = 16,
    group_reduce: str = "sum",
    summary: str = "minmax",
) -> Tensor:
    """Score of page p: sum over d of max(q_d * min_d, q_d * max_d), unscaled.

    Args:
        query: [batch, num_q_heads, 1, head_dim].
        page_summary: [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of the keys,
            minimum and maximum of the keys of each page, or with summary="minmax_int8" uint8
            [batch, num_kv_heads, num_pages, bytes_per_page]; only complete pages are read.
        seq_lens: int32 or int64 [batch] or [1], valid positions, the current token included.
        channel_scale: float32 [batch, num_kv_heads, head_dim], with summary="minmax_int8" only.
        page_size: positions per page.
        group_reduce: over the query heads that share a KV head: "sum" or "max" of their scores, or
            "none": a score per query head.
        summary: what page_summary holds, "minmax" or "minmax_int8".

    Returns:
        float32 [batch, num_select_heads, num_pages], num_select_heads being num_kv_heads, or
        num_q_heads for "none"; -inf for pages that are not complete.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    arguments = (query, page_summary, seq_lens, channel_scale)
    settings = {"page_size": page_size, "group_reduce": group_reduce, "summary": summary}
    _check(*arguments, **settings)
    return _score_pages(*arguments, **settings)
