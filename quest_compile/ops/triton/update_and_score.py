"""First launch of a sparse step: bring page summaries up to date, and score all pages."""

import triton
import triton.language as tl

from quest_compile.ops.triton.rows import (
    choose_rows,
    finish_update,
    is_stale,
    load_rows,
    make_rows,
    put_rows,
    seq_len_of,
)
from quest_compile.ops.triton.rows_minmax import score_minmax
from quest_compile.ops.triton.rows_sketch import query_codes, score_sketch


@triton.jit
def live_tokens(
    mask_ptr, pages, is_read, mask_len, mask_stride_h, M: tl.constexpr, M_PAD: tl.constexpr,
    F: tl.constexpr
):  # fmt: skip
    """bool [pages, T_PAD, M_PAD]: which positions may each of M heads attend?"""
    t, m = tl.arange(0, F.T_PAD), tl.arange(0, M_PAD)
    position = pages[:, None] * F.PAGE_SIZE + t[None, :]
    is_inside = is_read[:, None] & (t < F.PAGE_SIZE)[None, :] & (position < mask_len)
    pointers = mask_ptr + position[:, :, None] + (m * mask_stride_h)[None, None, :]
    is_inside = is_inside[:, :, None] & (m < M)[None, None, :]
    return tl.load(pointers, mask=is_inside, other=0) != 0


@triton.jit(
    do_not_specialize=["q_len", "step", "budget_tokens", "seq_stride_b", "seq_stride_i",
                       "mask_stride_b", "mask_stride_i", "mask_stride_h"],
    do_not_specialize_on_alignment=["first_ptr", "last_ptr", "sealed_ptr", "seq_lens_ptr",
                                    "mask_ptr"],
)  # fmt: skip
def update_and_score(
    # key_ptr [B, K, max_seq_len, D], summary_ptr [B, K, num_pages, ...]
    key_ptr, summary_ptr,
    # int64 [1], [1], [1 or 2]; int32 [B, K], written
    first_ptr, last_ptr, sealed_ptr, stale_ptr,
    # query_ptr [B, Q, q_len, D], seq_lens_ptr [B, q_len], mask_ptr bool [B, q_len, K * M, mask_len]
    # or None, scores_ptr float32 [B, q_len, K * N, num_pages], written
    query_ptr, seq_lens_ptr, mask_ptr, scores_ptr,
    key_stride_b, key_stride_h, key_stride_t,
    summary_stride_b, summary_stride_h, summary_stride_p,
    query_stride_b, query_stride_h, query_stride_i,
    seq_stride_b, seq_stride_i, step, q_len, budget_tokens, max_seq_len, num_pages,
    mask_stride_b, mask_stride_i, mask_stride_h, mask_len, scale,
    UPDATE: tl.constexpr, SCORE: tl.constexpr, HAS_NEXT: tl.constexpr, HAS_MASK: tl.constexpr,
    N: tl.constexpr, N_PAD: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr,
    M_PAD: tl.constexpr, PAGES_PER_PROGRAM: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Grid (page ranges, K, B). Rows of at most ``budget_tokens`` are not scored.

    N scores per KV head, each of the sum of HEADS query heads; M heads of the mask per KV head, 1
    if all share one. No program writes a summary that another one compares with the keys: heads
    found stale are scored from the keys here, and written by ``finish_update`` in a later launch.
    """
    k, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    first_page = tl.program_id(0) * PAGES_PER_PROGRAM
    end_page = tl.minimum(first_page + PAGES_PER_PROGRAM, num_pages)
    summary_ptr += b * summary_stride_b + k * summary_stride_h
    start, num_complete, stale = end_page.to(tl.int64), end_page.to(tl.int64), 0
    if UPDATE:
        key_ptr += b * key_stride_b + k * key_stride_h
        first = tl.minimum(tl.maximum(tl.load(first_ptr), 0), max_seq_len - 1)
        last = tl.minimum(tl.maximum(tl.load(last_ptr), 0), max_seq_len - 1)
        num_complete = (last + 1) // F.PAGE_SIZE
        start = tl.minimum(tl.maximum(tl.load(sealed_ptr), 0), first // F.PAGE_SIZE)
        if HAS_NEXT:
            next_position = tl.load(sealed_ptr + 1)
            start = tl.where((next_position < 0) | (next_position == first), start, 0)
        stale = is_stale(key_ptr, summary_ptr, start, first, key_stride_t, summary_stride_p, F)
        if tl.program_id(0) == 0:
            tl.store(stale_ptr + b * num_kv_heads + k, stale)
        start = tl.where(stale != 0, 0, start)
    for i in range(q_len):
        is_scored_row, num_scored = False, tl.full([], 0, tl.int64)
        if SCORE:
            seq_len = seq_len_of(
                seq_lens_ptr, b, i, q_len, seq_stride_b, seq_stride_i, step, max_seq_len
            )
            is_scored_row = seq_len > budget_tokens
            num_scored = tl.where(is_scored_row, seq_len // F.PAGE_SIZE, 0)
            q_ptr = query_ptr + b * query_stride_b + i * query_stride_i
            q_ptr += k * N * HEADS * query_stride_h
            if F.IS_SKETCH:
                query = query_codes(q_ptr, query_stride_h, scale, N, N_PAD, F)
        for page in range(first_page, end_page, F.PAGE_TILE):
            pages = page + tl.arange(0, F.PAGE_TILE).to(tl.int64)
            rows = summary_ptr + pages * summary_stride_p
            is_inside = pages < end_page
            is_new = (pages >= start) & (pages < num_complete) & is_inside
            is_scored = (pages < num_scored) & is_inside
            if SCORE:
                values = load_rows(rows, is_scored & ~is_new, F)
            if UPDATE:
                if (page + F.PAGE_TILE > start) & (page < num_complete):
                    new = make_rows(key_ptr, pages, is_new, key_stride_t, F)
                    put_rows(rows, new, is_new & (stale == 0) & (i == 0), F, False)
                    if SCORE:
                        values = choose_rows(is_new, new, values, F)
            if SCORE:
                if is_scored_row:
                    is_live = is_scored[:, None, None]
                    if HAS_MASK:
                        is_live = live_tokens(
                            mask_ptr + b * mask_stride_b + i * mask_stride_i
                            + k * M * mask_stride_h,
                            pages, is_scored, mask_len, mask_stride_h, M, M_PAD, F,
                        )  # fmt: skip
                    if F.IS_SKETCH:
                        is_token = (tl.arange(0, F.T_PAD) < F.PAGE_SIZE)[None, :, None]
                        score = score_sketch(values, query, is_live & is_token, F)
                    else:
                        score = score_minmax(values, q_ptr, query_stride_h, scale, N, N_PAD,
                                             HEADS, F)  # fmt: skip
                    if HAS_MASK:
                        has_live = tl.max(is_live.to(tl.int32), axis=1) > 0
                        score = tl.where(has_live, score, float("-inf"))
                    score = tl.where(is_scored[:, None], score, float("-inf"))
                    n = tl.arange(0, N_PAD)[None, :]
                    row = ((b * q_len + i) * num_kv_heads + k) * N + n
                    tl.store(scores_ptr + row * num_pages + pages[:, None], score,
                             mask=is_inside[:, None] & (n < N))  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["last_ptr", "sealed_ptr"])
def record_update(
    key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr,
    key_stride_b, key_stride_h, key_stride_t,
    summary_stride_b, summary_stride_h, summary_stride_p, max_seq_len,
    HAS_NEXT: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Grid (K, B): ``finish_update`` alone, where no other launch follows."""
    k, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    finish_update(
        key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr, b, k, True, (k == 0) & (b == 0),
        key_stride_b, key_stride_h, key_stride_t,
        summary_stride_b, summary_stride_h, summary_stride_p, tl.num_programs(0), max_seq_len,
        HAS_NEXT, F,
    )  # fmt: skip
