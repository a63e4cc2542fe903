"""Score every complete page: a bound of query.key over its keys, an estimate, or a share."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from quest_compile.ops import checks, reference, require
from quest_compile.ops.operator import operator
from quest_compile.ops.settings import FormatSettings, Selection, SummaryFormat, check_reduction
from quest_compile.ops.summaries import SUMMARIES


def _check(
    query,
    page_summary,
    seq_lens,
    attn_mask=None,
    *,
    group_reduce=Selection.group_reduce,
    scale=None,
    **settings,
):
    require.tensors(query=query, page_summary=page_summary, seq_lens=seq_lens)
    page_format = SummaryFormat(**settings)
    check_reduction(group_reduce, page_format.summary)
    summary = SUMMARIES[page_format.summary]
    row = summary.row(8, query.dtype, page_format)
    layout = f"[batch, num_kv_heads, num_pages, {row.layout}]"
    require.rank("page_summary", page_summary, 3 + len(row.shape), layout)
    num_kv_heads, num_pages = page_summary.shape[1:3]
    checks.query(query, num_kv_heads, takes_several=False)
    sizes = (query.shape[0], num_kv_heads, num_pages, query.shape[3])
    checks.page_summary(page_summary, page_format, query, sizes)
    checks.seq_lens(seq_lens, query, num_pages * page_format.page_size)
    if not summary.scores_tokens and group_reduce != "softmax":
        for name, value in (("attn_mask", attn_mask), ("scale", scale)):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None with summary={page_format.summary!r} and "
                    f"group_reduce={group_reduce!r}, got {value!r}"
                )
    checks.scale_of_products(scale)
    if attn_mask is not None:
        _check_mask(attn_mask, query, page_format, num_pages)


def _check_mask(attn_mask, query, page_format, num_pages):
    checks.attn_mask(attn_mask, query, (*query.shape[:2], 1, None))
    max_seq_len = attn_mask.shape[3]
    if max_seq_len != 1:
        require.that(
            page_format.num_pages(max_seq_len) == num_pages,
            lambda: (
                f"attn_mask: expected the positions of {num_pages} pages of "
                f"{page_format.page_size}, got {max_seq_len} positions"
            ),
        )


def _fake(
    query, page_summary, seq_lens, attn_mask, *, group_reduce=Selection.group_reduce, **settings
):
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    num_select_heads = query.shape[1] if group_reduce == "none" else num_kv_heads
    return query.new_empty(batch, num_select_heads, num_pages, dtype=torch.float32)


_OPERATOR = operator(
    "score_pages",
    "(Tensor query, Tensor page_summary, Tensor seq_lens, Tensor? attn_mask=None, *, "
    f"{Selection.schema('group_reduce')}, float? scale=None, {SummaryFormat.schema()}) -> Tensor",
    check=_check,
    reference=reference.score_pages,
    fake=_fake,
)


def score_pages(
    query: Tensor,
    page_summary: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    *,
    group_reduce: str = Selection.group_reduce,
    scale: float | None = None,
    **settings: Unpack[FormatSettings],
) -> Tensor:
    """Score of each complete page for the query heads that share a KV head.

    summary="minmax": sum_d max(q_d * min_d, q_d * max_d), float32, unscaled: never below query.key
    of any key of the page. summary="sketch": log of the sum of exp(scale * query.key) over the
    live tokens of the page, the products being estimated.

    Args:
        query: [batch, num_q_heads, 1, head_dim].
        page_summary: [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of the keys,
            minimum and maximum of the keys of each page, or with summary="sketch" uint8 [batch,
            num_kv_heads, num_pages, bytes_per_page]; only complete pages are read.
        seq_lens: int32 or int64 [batch] or [1], valid positions, the current token included.
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, 1, max_seq_len]: a
            head's score is of the tokens, or pages with tokens, that it may attend. With
            summary="sketch" or group_reduce="softmax" only.
        group_reduce: "none": a score per query head; "softmax": the sum, over the heads that share
            a KV head, of each head's softmax over its scores (min/max: times scale); "sum": of the
            sum of their queries, with summary="minmax" only.
        scale: of query.key, 1 / sqrt(head_dim) by default; where attn_mask is taken.
        settings: those of SummaryFormat.

    Returns:
        float32 [batch, num_select_heads, num_pages], num_select_heads being num_kv_heads, or
        num_q_heads for "none"; -inf for pages that are not complete or have no token that counts.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    tensors = (query, page_summary, seq_lens, attn_mask)
    return _OPERATOR(*tensors, group_reduce=group_reduce, scale=scale, **settings)
