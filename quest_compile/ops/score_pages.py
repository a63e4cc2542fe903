"""Score every complete page: an upper bound of query.key over its keys, or an estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, limits, reference, registration, require, summary_checks
from quest_compile.ops.checked_call import checked_call
from quest_compile.ops.native import announce_reference

registration.define(
    "score_pages",
    "(Tensor query, Tensor page_summary, Tensor seq_lens, Tensor? channel_scale=None, *, "
    'int page_size=16, str group_reduce="sum", str summary="minmax", int sketch_bits=1, '
    "Tensor? attn_mask=None, float? scale=None) -> Tensor",
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
    sketch_bits=1,
    attn_mask=None,
    scale=None,
):
    require.tensors(query=query, page_summary=page_summary, seq_lens=seq_lens)
    checks.page_size(page_size)
    checks.group_reduce(group_reduce)
    summary_checks.summary_kind(summary, sketch_bits)
    is_float = summary == "minmax"
    row = "2, head_dim" if is_float else "bytes_per_page"
    layout = f"[batch, num_kv_heads, num_pages, {row}]"
    require.rank("page_summary", page_summary, 5 if is_float else 4, layout)
    num_kv_heads, num_pages = page_summary.shape[1:3]
    checks.query(query, num_kv_heads, takes_several=False)
    sizes = (query.shape[0], num_kv_heads, num_pages, query.shape[3])
    summary_checks.page_summary(
        page_summary, channel_scale, summary, query, sizes, page_size, sketch_bits
    )
    checks.seq_lens(seq_lens, query, num_pages * page_size)
    _check_mask(query, attn_mask, scale, summary, num_pages, page_size)


def _check_mask(query, attn_mask, scale, summary, num_pages, page_size):
    for name, value in (("attn_mask", attn_mask), ("scale", scale)):
        if summary != "sketch" and value is not None:
            raise ValueError(f"{name}: expected None with summary={summary!r}, got {value!r}")
    checks.scale_of_products(scale)
    if attn_mask is None:
        return
    checks.attn_mask(attn_mask, query, (*query.shape[:2], 1, None))
    max_seq_len = attn_mask.shape[3]
    if max_seq_len != 1:
        require.that(
            limits.num_pages_of(max_seq_len, page_size) == num_pages,
            lambda: (
                f"attn_mask: expected the positions of {num_pages} pages of {page_size}, "
                f"got {max_seq_len} positions"
            ),
        )


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
    sketch_bits: int = 1,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Score of page p: sum over d of max(q_d * min_d, q_d * max_d), unscaled.

    With summary="sketch" it is the log of the sum of exp(scale * q.k) over the tokens of the page
    that attn_mask does not forbid, each q.k being estimated; for group_reduce="sum" with the mean
    of the queries that share a KV head.

    Args:
        query: [batch, num_q_heads, 1, head_dim].
        page_summary: [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of the keys,
            minimum and maximum of the keys of each page, or with summary="sketch" uint8 [batch,
            num_kv_heads, num_pages, bytes_per_page]; only complete pages are read.
        seq_lens: int32 or int64 [batch] or [1], valid positions, the current token included.
        channel_scale: float32, what update_page_summary wrote, with summary="sketch"; else none.
        page_size: positions per page.
        group_reduce: over the query heads that share a KV head: "sum" or "max" of their scores, or
            "none": a score per query head.
        summary: what page_summary holds, "minmax" or "sketch".
        sketch_bits: 1 or 2, with summary="sketch".
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, 1, max_seq_len], with
            summary="sketch" only. A token counts if a query head attends it that shares the score.
        scale: of query.key, with summary="sketch" only; 1 / sqrt(head_dim) by default.

    Returns:
        float32 [batch, num_select_heads, num_pages], num_select_heads being num_kv_heads, or
        num_q_heads for "none"; -inf for pages that are not complete or have no token that counts.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    arguments = (query, page_summary, seq_lens, channel_scale)
    settings = {
        "page_size": page_size,
        "group_reduce": group_reduce,
        "summary": summary,
        "sketch_bits": sketch_bits,
        "attn_mask": attn_mask,
        "scale": scale,
    }
    return checked_call(_score_pages, _check, arguments, settings)
