"""First launch of a sparse step: bring page summaries up to date, and score all pages."""

import triton
import triton.language as tl

from quest_compile.ops.triton.rows import finish_update, is_stale, seal, seq_len_of

_ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def group_weights(
    query_ptr, stride_h, d, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):  # fmt: skip
    """What both halves of a row are multiplied with, summed over the query heads of a group."""
    low = tl.zeros([D_PAD], tl.float32)
    high = tl.zeros([D_PAD], tl.float32)
    for g in range(G):
        q = tl.load(query_ptr + g * stride_h + d, mask=d < D, other=0.0).to(tl.float32)
        low += tl.minimum(q, 0.0, propagate_nan=_ALL)
        high += tl.maximum(q, 0.0, propagate_nan=_ALL)
    return low, high


@triton.jit
def bounds(page_low, page_high, low, high):
    return tl.sum(page_low * low[None, :] + page_high * high[None, :], axis=1)


@triton.jit(
    do_not_specialize=["q_len", "step", "budget_tokens", "seq_stride_b", "seq_stride_i"],
    do_not_specialize_on_alignment=["first_ptr", "last_ptr", "sealed_ptr", "seq_lens_ptr"],
)
def update_and_score(
    # key_ptr [B, K, max_seq_len, D], summary_ptr [B, K, num_pages, 2, D]
    key_ptr, summary_ptr,
    # int64 [1], [1], [1 or 2]; int32 [B, K], written
    first_ptr, last_ptr, sealed_ptr, stale_ptr,
    # query_ptr [B, Q, q_len, D], seq_lens_ptr [B, q_len], scores_ptr [B, q_len, S, num_pages]
    query_ptr, seq_lens_ptr, scores_ptr,
    key_stride_b, key_stride_h, key_stride_t,
    summary_stride_b, summary_stride_h, summary_stride_p,
    query_stride_b, query_stride_h, query_stride_i,
    seq_stride_b, seq_stride_i, step, q_len, budget_tokens, max_seq_len, num_pages,
    UPDATE: tl.constexpr, SCORE: tl.constexpr, HAS_NEXT: tl.constexpr,
    GROUP_REDUCE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_TILE: tl.constexpr, PAGES_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Grid (page ranges, K, B). Rows of at most ``budget_tokens`` are not scored.

    No program writes a summary that another one compares with the keys: heads found stale are
    scored from the keys here, and written by ``finish_update`` in a later launch.
    """
    k, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    first_page = tl.program_id(0) * PAGES_PER_PROGRAM
    end_page = tl.minimum(first_page + PAGES_PER_PROGRAM, num_pages)
    if UPDATE:
        key_ptr += b * key_stride_b + k * key_stride_h
    summary_ptr += b * summary_stride_b + k * summary_stride_h
    d = tl.arange(0, D_PAD)
    start, num_complete, stale = end_page.to(tl.int64), end_page.to(tl.int64), 0
    if UPDATE:
        first = tl.minimum(tl.maximum(tl.load(first_ptr), 0), max_seq_len - 1)
        last = tl.minimum(tl.maximum(tl.load(last_ptr), 0), max_seq_len - 1)
        num_complete = (last + 1) // PAGE_SIZE
        start = tl.minimum(tl.maximum(tl.load(sealed_ptr), 0), first // PAGE_SIZE)
        if HAS_NEXT:
            next_position = tl.load(sealed_ptr + 1)
            start = tl.where((next_position < 0) | (next_position == first), start, 0)
        stale = is_stale(
            key_ptr, summary_ptr, start, first, key_stride_t, summary_stride_p, D, D_PAD, PAGE_SIZE
        )
        if tl.program_id(0) == 0:
            tl.store(stale_ptr + b * num_kv_heads + k, stale)
        start = tl.where(stale != 0, 0, start)
    longest = end_page * PAGE_SIZE
    if SCORE:
        longest = seq_len_of(
            seq_lens_ptr, b, q_len - 1, q_len, seq_stride_b, seq_stride_i, step, max_seq_len
        )
    for page in range(first_page, end_page, PAGE_TILE):
        pages = page + tl.arange(0, PAGE_TILE).to(tl.int64)
        low = tl.zeros([PAGE_TILE, D_PAD], tl.float32)
        high = low
        is_new = (pages >= start) & (pages < num_complete) & (pages < end_page)
        if SCORE:
            is_read = (pages < longest // PAGE_SIZE) & (pages < end_page) & ~is_new
            is_read_d = is_read[:, None] & (d < D)[None, :]
            pointers = summary_ptr + pages[:, None] * summary_stride_p + d[None, :]
            low = tl.load(pointers, mask=is_read_d, other=0.0).to(tl.float32)
            high = tl.load(pointers + D, mask=is_read_d, other=0.0).to(tl.float32)
        if UPDATE:
            if (page + PAGE_TILE > start) & (page < num_complete):
                new_low, new_high = seal(
                    key_ptr, summary_ptr, pages, is_new, key_stride_t, summary_stride_p,
                    stale == 0, D, D_PAD, PAGE_SIZE,
                )  # fmt: skip
                low = tl.where(is_new[:, None], new_low, low)
                high = tl.where(is_new[:, None], new_high, high)
        if SCORE:
            for i in range(q_len):
                seq_len = seq_len_of(
                    seq_lens_ptr, b, i, q_len, seq_stride_b, seq_stride_i, step, max_seq_len
                )
                if seq_len > budget_tokens:
                    is_complete = pages < seq_len // PAGE_SIZE
                    q_ptr = query_ptr + b * query_stride_b + i * query_stride_i
                    q_ptr += k * G * query_stride_h
                    out_ptr = scores_ptr + (b * q_len + i) * num_kv_heads * num_pages + pages
                    if GROUP_REDUCE == "none":
                        for g in range(G):
                            w_low, w_high = group_weights(
                                q_ptr + g * query_stride_h, query_stride_h, d, 1, D, D_PAD
                            )
                            score = bounds(low, high, w_low, w_high)
                            score = tl.where(is_complete, score, float("-inf"))
                            row = (b * q_len + i) * num_kv_heads * G + k * G + g
                            row_ptr = scores_ptr + row * num_pages + pages
                            tl.store(row_ptr, score, mask=pages < end_page)
                    else:
                        if GROUP_REDUCE == "sum":
                            w_low, w_high = group_weights(q_ptr, query_stride_h, d, G, D, D_PAD)
                            score = bounds(low, high, w_low, w_high)
                        else:
                            score = tl.full([PAGE_TILE], float("-inf"), tl.float32)
                            for g in range(G):
                                w_low, w_high = group_weights(
                                    q_ptr + g * query_stride_h, query_stride_h, d, 1, D, D_PAD
                                )
                                one = bounds(low, high, w_low, w_high)
                                score = tl.maximum(score, one, propagate_nan=_ALL)
                        score = tl.where(is_complete, score, float("-inf"))
                        tl.store(out_ptr + k * num_pages, score, mask=pages < end_page)


@triton.jit(do_not_specialize_on_alignment=["last_ptr", "sealed_ptr"])
def record_update(
    key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr,
    key_stride_b, key_stride_h, key_stride_t,
    summary_stride_b, summary_stride_h, summary_stride_p, max_seq_len,
    HAS_NEXT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PAGE_TILE: tl.constexpr,
):  # fmt: skip
    """Grid (K, B): ``finish_update`` alone, where no other launch follows."""
    k, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    finish_update(
        key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr, b, k, True, (k == 0) & (b == 0),
        key_stride_b, key_stride_h, key_stride_t,
        summary_stride_b, summary_stride_h, summary_stride_p, tl.num_programs(0), max_seq_len,
        HAS_NEXT, D, D_PAD, PAGE_SIZE, PAGE_TILE,
    )  # fmt: skip
