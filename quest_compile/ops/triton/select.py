"""Second launch of a sparse step: the pages of each row and head, in ascending order."""

import triton
import triton.language as tl

from quest_compile.ops.triton.rows import finish_update, seq_len_of


@triton.jit
def live_pages(mask_ptr, pages, num_used, seq_len, mask_len, mask_stride_h, NUM_HEADS: tl.constexpr,
               HAS_MASK: tl.constexpr, PAGE_SIZE: tl.constexpr):  # fmt: skip
    """bool [pages]: is any position of the page attended by any of NUM_HEADS heads? The mask comes
    as words of 8 positions."""
    is_used = pages < num_used
    if HAS_MASK:
        found = tl.zeros(pages.shape, tl.int64)
        for head in range(NUM_HEADS):
            for w in range(PAGE_SIZE // 8):
                position = pages * PAGE_SIZE + 8 * w
                is_read = is_used & (position < seq_len) & (position < mask_len)
                word = tl.load(
                    mask_ptr + head * mask_stride_h + position // 8, mask=is_read, other=0
                )
                # Little-endian: the low bytes are the first positions.
                num_in_use = tl.minimum(tl.maximum(seq_len - position, 0), 8)
                low_bytes = (tl.full([1], 1, tl.int64) << (num_in_use % 8 * 8)) - 1
                found |= tl.where(num_in_use < 8, word & low_bytes, word)
        is_used = is_used & (found != 0)
    return is_used


@triton.jit
def ranks(
    scores_ptr, mask_ptr, pages, num_pages, num_live_before, seq_len, mask_len, mask_stride_h,
    num_sink_pages, num_recent_pages, NUM_HEADS: tl.constexpr, HAS_MASK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """uint32 [pages]: the larger, the earlier chosen; 0 for what cannot be."""
    num_used = (seq_len + PAGE_SIZE - 1) // PAGE_SIZE
    is_live = live_pages(mask_ptr, pages, num_used, seq_len, mask_len, mask_stride_h, NUM_HEADS,
                         HAS_MASK, PAGE_SIZE)  # fmt: skip
    is_live = is_live & (pages < num_pages)
    num_live = num_live_before + tl.cumsum(is_live.to(tl.int32), axis=0)
    is_forced = (num_live <= num_sink_pages) | (pages >= num_used - num_recent_pages)
    # Adding 0 makes one zero of two. The bits of negative floats are in descending order.
    score = tl.load(scores_ptr + pages, mask=is_live, other=0.0) + 0.0
    bits = score.to(tl.uint32, bitcast=True)
    rank = tl.where(bits < 0x80000000, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    rank = tl.where(score != score, 0xFFFFFFFE, rank)
    rank = tl.where(is_forced, 0xFFFFFFFF, rank)
    return tl.where(is_live, rank, 0).to(tl.uint32), tl.sum(is_live.to(tl.int32), axis=0)


@triton.jit(
    do_not_specialize=["q_len", "step", "budget_tokens", "seq_stride_b", "seq_stride_i",
                       "mask_stride_b", "mask_stride_i", "mask_stride_h",
                       "num_sink_pages", "num_recent_pages", "page_budget"],
    do_not_specialize_on_alignment=["last_ptr", "sealed_ptr", "seq_lens_ptr", "mask_ptr"],
)  # fmt: skip
def select(
    # scores_ptr float32 [B, q_len, S, num_pages], seq_lens_ptr [B, q_len],
    # mask_ptr int64 [B, q_len, S * NUM_HEADS, mask_len / 8], or None
    scores_ptr, seq_lens_ptr, mask_ptr,
    # uint32 [B, q_len, S, num_pages], for more pages than PAGE_TILE;
    # int32 [B, q_len, S, page_budget], written;
    # int32 [B, q_len, counters_per_row], zeroed for the next launch, or None
    ranks_ptr, pages_ptr, counters_ptr,
    seq_stride_b, seq_stride_i, step, q_len, budget_tokens, max_seq_len,
    mask_stride_b, mask_stride_i, mask_stride_h, mask_len,
    num_pages, page_budget, num_sink_pages, num_recent_pages, counters_per_row,
    # What finish_update takes.
    key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr,
    key_stride_b, key_stride_h, key_stride_t,
    summary_stride_b, summary_stride_h, summary_stride_p,
    UPDATE: tl.constexpr, HAS_NEXT: tl.constexpr, HEADS_PER_KV_HEAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, SEAL_TILE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_COUNTERS: tl.constexpr, NUM_HEADS: tl.constexpr,
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
            max_seq_len, HAS_NEXT, D, D_PAD, PAGE_SIZE, SEAL_TILE,
        )  # fmt: skip
    if HAS_COUNTERS:
        for counter in range(s, counters_per_row, num_heads):
            tl.store(counters_ptr + row * counters_per_row + counter, 0)
    seq_len = seq_len_of(
        seq_lens_ptr, b, i, q_len, seq_stride_b, seq_stride_i, step, max_seq_len
    )  # fmt: skip
    if seq_len > budget_tokens:
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
        # The largest threshold that page_budget pages reach, two bits at a time: three counts of 20
        # bits in one sum.
        threshold = tl.full([], 0, tl.uint32)
        for digit in range(16):
            one = tl.full([], 1, tl.uint32) << (30 - 2 * digit)
            counts = tl.full([], 0, tl.int64)
            for tile in range(NUM_TILES):
                if NUM_TILES > 1:
                    page = pages + tile * PAGE_TILE
                    rank = tl.load(ranks_ptr + page, mask=page < num_pages, other=0)
                reached = (rank >= threshold + one).to(tl.int64)
                reached += (rank >= threshold + 2 * one).to(tl.int64) << 20
                reached += (rank >= threshold + 3 * one).to(tl.int64) << 40
                counts += tl.sum(reached, axis=0)
            digits = ((counts & 0xFFFFF) >= page_budget).to(tl.uint32)
            digits += (((counts >> 20) & 0xFFFFF) >= page_budget).to(tl.uint32)
            digits += ((counts >> 40) >= page_budget).to(tl.uint32)
            threshold += digits * one
        num_above = 0
        for tile in range(NUM_TILES):
            if NUM_TILES > 1:
                page = pages + tile * PAGE_TILE
                rank = tl.load(ranks_ptr + page, mask=page < num_pages, other=0)
            num_above += tl.sum((rank > threshold).to(tl.int32), axis=0)
        num_chosen, num_ties = 0, 0
        for tile in range(NUM_TILES):
            page = pages + tile * PAGE_TILE
            if NUM_TILES > 1:
                rank = tl.load(ranks_ptr + page, mask=page < num_pages, other=0)
            is_tie = (rank == threshold) & (rank > 0)
            tie = num_ties + tl.cumsum(is_tie.to(tl.int32), axis=0)
            is_chosen = (rank > threshold) | (is_tie & (tie <= page_budget - num_above))
            slot = num_chosen + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
            tl.store(pages_ptr + slot, page, mask=is_chosen)
            num_ties += tl.sum(is_tie.to(tl.int32), axis=0)
            num_chosen += tl.sum(is_chosen.to(tl.int32), axis=0)
        slot = tl.arange(0, BUDGET_PAD)
        tl.store(pages_ptr + slot, -1, mask=(slot >= num_chosen) & (slot < page_budget))
