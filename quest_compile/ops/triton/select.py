"""Second launch of a sparse step: the pages of each row and head, in ascending order."""

import triton
import triton.language as tl

from quest_compile.ops.triton.budgets import row_budget, top_p_budget
from quest_compile.ops.triton.page_ranks import load_ranks, ranks
from quest_compile.ops.triton.rows import finish_update, seq_len_of
from quest_compile.ops.triton.shares import join_heads


@triton.jit(
    do_not_specialize=["q_len", "step", "budget_tokens", "seq_stride_b", "seq_stride_i",
                       "mask_stride_b", "mask_stride_i", "mask_stride_h",
                       "num_sink_pages", "num_recent_pages", "page_budget", "fraction_bits",
                       "top_p_bits"],
    do_not_specialize_on_alignment=["last_ptr", "sealed_ptr", "seq_lens_ptr", "mask_ptr"],
)  # fmt: skip
def select(
    # scores_ptr float32 [B, q_len, S, num_pages]; if heads are JOINED, [B, q_len, S * JOINED,
    # num_pages], and shares_ptr [B, q_len, S, num_pages], written; seq_lens_ptr [B, q_len],
    # mask_ptr int64 [B, q_len, S * NUM_HEADS, mask_len / 8], or None
    scores_ptr, shares_ptr, seq_lens_ptr, mask_ptr,
    # uint32 [B, q_len, S, num_pages], for more pages than PAGE_TILE;
    # int32 [B, q_len, S, page_budget], written;
    # int32 [B, q_len, counters_per_row], zeroed for the next launch, or None
    ranks_ptr, pages_ptr, counters_ptr,
    seq_stride_b, seq_stride_i, step, q_len, budget_tokens, max_seq_len,
    mask_stride_b, mask_stride_i, mask_stride_h, mask_len,
    num_pages, page_budget, num_sink_pages, num_recent_pages, fraction_bits, top_p_bits, scale_log2,
    counters_per_row,
    # What finish_update takes.
    key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr,
    key_stride_b, key_stride_h, key_stride_t,
    summary_stride_b, summary_stride_h, summary_stride_p,
    UPDATE: tl.constexpr, HAS_NEXT: tl.constexpr, F: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr, JOINED: tl.constexpr, HAS_FRACTION: tl.constexpr,
    HAS_TOP_P: tl.constexpr, HAS_MASK: tl.constexpr, HAS_COUNTERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_TILE: tl.constexpr, NUM_TILES: tl.constexpr,
    BUDGET_PAD: tl.constexpr,
):  # fmt: skip
    """Grid (S, B * q_len). Rows of at most ``budget_tokens`` select nothing."""
    s, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(0)
    b, i = row // q_len, row % q_len
    if UPDATE:
        finish_update(
            key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr, b, s // HEADS_PER_KV_HEAD,
            (i == 0) & (s % HEADS_PER_KV_HEAD == 0), (s == 0) & (row == 0),
            key_stride_b, key_stride_h, key_stride_t,
            summary_stride_b, summary_stride_h, summary_stride_p, num_heads // HEADS_PER_KV_HEAD,
            max_seq_len, HAS_NEXT, F,
        )  # fmt: skip
    if HAS_COUNTERS:
        for counter in range(s, counters_per_row, num_heads):
            tl.store(counters_ptr + row * counters_per_row + counter, 0)
    seq_len = seq_len_of(
        seq_lens_ptr, b, i, q_len, seq_stride_b, seq_stride_i, step, max_seq_len
    )  # fmt: skip
    if seq_len > budget_tokens:
        if JOINED > 0:
            scores_ptr += (row * num_heads + s) * JOINED * num_pages
            shares_ptr += (row * num_heads + s) * num_pages
            join_heads(scores_ptr, shares_ptr, num_pages, JOINED, PAGE_TILE, NUM_TILES)
            scores_ptr = shares_ptr
        else:
            scores_ptr += (row * num_heads + s) * num_pages
        ranks_ptr += (row * num_heads + s) * num_pages
        pages_ptr += (row * num_heads + s) * page_budget
        if HAS_MASK:
            mask_ptr += b * mask_stride_b + i * mask_stride_i + s * NUM_HEADS * mask_stride_h
        pages = tl.arange(0, PAGE_TILE)
        num_live = 0
        rank = tl.zeros([PAGE_TILE], tl.uint32)
        for tile in range(NUM_TILES):
            rank, more = ranks(
                scores_ptr, mask_ptr, pages + tile * PAGE_TILE, num_pages, num_live, seq_len,
                mask_len, mask_stride_h, num_sink_pages, num_recent_pages, NUM_HEADS, HAS_MASK,
                PAGE_SIZE,
            )  # fmt: skip
            num_live += more
            if NUM_TILES > 1:
                page = pages + tile * PAGE_TILE
                tl.store(ranks_ptr + page, rank, mask=page < num_pages)
        if NUM_TILES > 1:
            tl.debug_barrier()
        budget = tl.full([], page_budget, tl.int64)
        if HAS_FRACTION:
            num_used = (seq_len + PAGE_SIZE - 1) // PAGE_SIZE
            budget = row_budget(
                num_used, fraction_bits, page_budget, num_sink_pages + num_recent_pages
            )
        if HAS_TOP_P:
            budget = tl.minimum(budget, top_p_budget(ranks_ptr, rank, num_pages, top_p_bits,
                                                     scale_log2, PAGE_TILE, NUM_TILES))  # fmt: skip
        # The largest threshold that as many pages reach, two bits at a time: three counts of 20
        # bits in one sum.
        threshold = tl.full([], 0, tl.uint32)
        for digit in range(16):
            one = tl.full([], 1, tl.uint32) << (30 - 2 * digit)
            counts = tl.full([], 0, tl.int64)
            for tile in range(NUM_TILES):
                rank = load_ranks(ranks_ptr, rank, tile, num_pages, PAGE_TILE, NUM_TILES)
                reached = (rank >= threshold + one).to(tl.int64)
                reached += (rank >= threshold + 2 * one).to(tl.int64) << 20
                reached += (rank >= threshold + 3 * one).to(tl.int64) << 40
                counts += tl.sum(reached, axis=0)
            digits = ((counts & 0xFFFFF) >= budget).to(tl.uint32)
            digits += (((counts >> 20) & 0xFFFFF) >= budget).to(tl.uint32)
            digits += ((counts >> 40) >= budget).to(tl.uint32)
            threshold += digits * one
        num_above = 0
        for tile in range(NUM_TILES):
            rank = load_ranks(ranks_ptr, rank, tile, num_pages, PAGE_TILE, NUM_TILES)
            num_above += tl.sum((rank > threshold).to(tl.int32), axis=0)
        num_chosen, num_ties = 0, 0
        for tile in range(NUM_TILES):
            page = pages + tile * PAGE_TILE
            rank = load_ranks(ranks_ptr, rank, tile, num_pages, PAGE_TILE, NUM_TILES)
            is_tie = (rank == threshold) & (rank > 0)
            tie = num_ties + tl.cumsum(is_tie.to(tl.int32), axis=0)
            is_chosen = (rank > threshold) | (is_tie & (tie <= budget - num_above))
            slot = num_chosen + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
            tl.store(pages_ptr + slot, page, mask=is_chosen)
            num_ties += tl.sum(is_tie.to(tl.int32), axis=0)
            num_chosen += tl.sum(is_chosen.to(tl.int32), axis=0)
        slot = tl.arange(0, BUDGET_PAD)
        tl.store(pages_ptr + slot, -1, mask=(slot >= num_chosen) & (slot < page_budget))
