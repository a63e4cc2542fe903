"""Score every complete page: an upper bound of query.key over its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, reference, registration, require
from quest_compile.ops.native import announce_reference

registration.define(
    "score_pages",
    "(Tensor query, Tensor page_summary, Tensor seq_lens, *, int page_size=16, "
    'str group_reduce="sum") -> Tensor',
)


def _check(query, page_summary, seq_lens, *, page_size=16, group_reduce="sum"):
    require.tensors(query=query, page_summary=page_summary, seq_lens=seq_lens)
    checks.page_size(page_size)
    checks.group_reduce(group_reduce)
    require.rank("page_summary", page_summary, 5, "[batch, num_kv_heads, num_pages, 2, head_dim]")
    num_kv_heads, num_pages = page_summary.shape[1:3]
    checks.query(query, num_kv_heads, takes_several=False)
    sizes = (query.shape[0], num_kv_heads, num_pages, query.shape[3])
    checks.page_summary(page_summary, query, sizes)
    checks.seq_lens(seq_lens, query, num_pages * page_size)


@registration.reference("score_pages")
def _score_pages_reference(query, page_summary, seq_lens, **settings):
    _check(query, page_summary, seq_lens, **settings)
    announce_reference(query)
    return reference.score_pages(query, page_summary, seq_lens, **settings)


@registration.fake("score_pages")
def _score_pages_fake(query, page_summary, seq_lens, *, group_reduce="sum", **settings):
    _check(query, page_summary, seq_lens, group_reduce=group_reduce, **settings)
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    num_select_heads = query.shape[1] if group_reduce == "none" else num_kv_heads
    return query.new_empty(batch, num_select_heads, num_pages, dtype=torch.float32)


_score_pages = torch.ops.quest.score_pages.default


def score_pages(
    query: Tensor,
    page_summary: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int = 16,
    group_reduce: str = "sum",
) -> Tensor:
    """Score of page p: sum over d of max(q_d * min_d, q_d * max_d), unscaled.

    Args:
        query: [batch, num_q_heads, 1, head_dim].
        page_summary: [batch, num_kv_heads, num_pages, 2, head_dim], minimum and maximum of the keys
            of each page; only rows of complete pages are read.
        seq_lens: int32 or int64 [batch] or [1], valid positions, the current token included.
        page_size: positions per page.
        group_reduce: over the query heads that share a KV head: "sum" or "max" of their scores, or
            "none": a score per query head.

    Returns:
        float32 [batch, num_select_heads, num_pages], num_select_heads being num_kv_heads, or
        num_q_heads for "none"; -inf for pages that are not complete.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    settings = {"page_size": page_size, "group_reduce": group_reduce}
    _check(query, page_summary, seq_lens, **settings)
    return _score_pages(query, page_summary, seq_lens, **settings)
