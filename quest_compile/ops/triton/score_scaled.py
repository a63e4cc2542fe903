"""First launches of a sparse step whose summaries are sketches, which have scales of channels.

Scales come from pages all over the cache and decide every row. So one launch looks for foreign
writes, makes the scales and the weights of the queries, and the next one makes rows and scores.
Both are compiled without contraction (the rows are those of the reference, bit by bit).
"""

import triton
import triton.language as tl

from quest_compile.ops.triton.channel_scales import floor_to_power_of_two, sketch_scales
from quest_compile.ops.triton.rows import seq_len_of
from quest_compile.ops.triton.rows_sketch import sketch_rows
from quest_compile.ops.triton.scaled_scores import live_tokens, sketch_scores, write_weights

_ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit(
    do_not_specialize=["q_len"],
    do_not_specialize_on_alignment=["first_ptr", "last_ptr", "sealed_ptr"],
)
def scale_and_weigh(
    # key_ptr [B, K, max_seq_len, D], row_ptr uint8 [B, K, num_pages, bytes],
    # scale_ptr float32 [B, K, SCALE_SIZE]
    key_ptr, row_ptr, scale_ptr,
    # int64 [1], [1], [1 or 2]; int32 [B, K], written: pages from this one on are made
    first_ptr, last_ptr, sealed_ptr, start_ptr,
    # query_ptr [B, Q, q_len, D]; weights_ptr float32 [B, q_len, K, N, 2 * D + 8], written
    query_ptr, weights_ptr,
    key_stride_b, key_stride_h, key_stride_t, row_stride_b, row_stride_h, row_stride_p,
    query_stride_b, query_stride_h, query_stride_i, q_len, max_seq_len, scale,
    UPDATE: tl.constexpr, SCORE: tl.constexpr, HAS_NEXT: tl.constexpr,
    BITS: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, SCALE_SIZE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, T_PAD: tl.constexpr,
    SEAL_TILE: tl.constexpr,
):  # fmt: skip
    """Grid (K, B). N scores per KV head, each of HEADS query heads."""
    k, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    num_kv_heads = tl.num_programs(0)
    scale_ptr += (b * num_kv_heads + k) * SCALE_SIZE
    if UPDATE:
        key_ptr += b * key_stride_b + k * key_stride_h
        row_ptr += b * row_stride_b + k * row_stride_h
        first = tl.minimum(tl.maximum(tl.load(first_ptr), 0), max_seq_len - 1)
        last = tl.minimum(tl.maximum(tl.load(last_ptr), 0), max_seq_len - 1)
        sealed = tl.load(sealed_ptr)
        start = tl.minimum(tl.maximum(sealed, 0), first // PAGE_SIZE)
        if HAS_NEXT:
            next_position = tl.load(sealed_ptr + 1)
            start = tl.where((next_position < 0) | (next_position == first), start, 0)
        # Scales depend on the keys of these pages alone, and not on how they came in.
        num_scaled = floor_to_power_of_two((last + 1) // PAGE_SIZE)
        is_scaled = (floor_to_power_of_two(sealed) == num_scaled) & (start >= num_scaled)
        start = tl.where(is_scaled, start, 0)
        if start > 0:
            # Somebody else may have written the cache: compare some pages with their keys.
            sample = tl.arange(0, 4)
            spread = first * 2654435761 % 4294967296 + 40503 * (sample - 1)
            pages = tl.where(sample == 0, start - 1, spread % start)
            stale = sketch_rows(
                key_ptr, row_ptr, scale_ptr, pages, sample >= 0, key_stride_t, row_stride_p, D,
                D_PAD, PAGE_SIZE, T_PAD, BITS, True,
            )  # fmt: skip
            start = tl.where(stale != 0, 0, start)
        tl.store(start_ptr + b * num_kv_heads + k, start.to(tl.int32))
        tl.debug_barrier()
        if (start == 0) & (num_scaled > 0):
            sketch_scales(
                key_ptr, scale_ptr, num_scaled, key_stride_t, D, D_PAD, PAGE_SIZE, SEAL_TILE
            )
        tl.debug_barrier()
    if SCORE:
        query_ptr += b * query_stride_b + k * N * HEADS * query_stride_h
        for i in range(q_len):
            for n in range(N):
                row = ((b * q_len + i) * num_kv_heads + k) * N + n
                write_weights(
                    weights_ptr + row * (2 * D + 8),
                    query_ptr + i * query_stride_i + n * HEADS * query_stride_h, scale_ptr,
                    query_stride_h, scale, HEADS, D, D_PAD,
                )  # fmt: skip


@triton.jit(
    do_not_specialize=["q_len", "step", "budget_tokens", "seq_stride_b", "seq_stride_i",
                       "mask_stride_b", "mask_stride_i", "mask_stride_h"],
    do_not_specialize_on_alignment=["last_ptr", "sealed_ptr", "seq_lens_ptr", "mask_ptr"],
)  # fmt: skip
def seal_and_score(
    # key_ptr [B, K, max_seq_len, D], row_ptr uint8 [B, K, num_pages, bytes],
    # scale_ptr float32 [B, K, SCALE_SIZE]
    key_ptr, row_ptr, scale_ptr,
    # int64 [1], [1 or 2], written; int32 [B, K]
    last_ptr, sealed_ptr, start_ptr,
    # weights_ptr float32 [B, q_len, K, N, 2 * D + 8], seq_lens_ptr [B, q_len], mask_ptr bool
    # [B, q_len, K * N * NUM_HEADS or 1, mask_len] or None; scores_ptr [B, q_len, S, num_pages]
    weights_ptr, seq_lens_ptr, mask_ptr, scores_ptr,
    key_stride_b, key_stride_h, key_stride_t, row_stride_b, row_stride_h, row_stride_p,
    seq_stride_b, seq_stride_i, step, q_len, budget_tokens, max_seq_len, num_pages,
    mask_stride_b, mask_stride_i, mask_stride_h, mask_len,
    UPDATE: tl.constexpr, SCORE: tl.constexpr, HAS_NEXT: tl.constexpr,
    HAS_MASK: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr,
    IS_MAX: tl.constexpr, NUM_HEADS: tl.constexpr, SCALE_SIZE: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, T_PAD: tl.constexpr,
    PAGE_TILE: tl.constexpr, SEAL_TILE: tl.constexpr, PAGES_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Grid (page ranges, K, B). Rows of at most ``budget_tokens`` are not scored.

    NUM_HEADS: of the mask, for each selection; ALIGNED: rows begin at multiples of 8 bytes."""
    k, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    first_page = tl.program_id(0) * PAGES_PER_PROGRAM
    end_page = tl.minimum(first_page + PAGES_PER_PROGRAM, num_pages)
    if ALIGNED:
        # What the compiler needs to see, to read 8 bytes at once.
        row_stride_p = row_stride_p // 8 * 8
        row_stride_h = row_stride_h // 8 * 8
        row_stride_b = row_stride_b // 8 * 8
    row_ptr += b * row_stride_b + k * row_stride_h
    if UPDATE:
        key_ptr += b * key_stride_b + k * key_stride_h
        scale_ptr += (b * num_kv_heads + k) * SCALE_SIZE
        last = tl.minimum(tl.maximum(tl.load(last_ptr), 0), max_seq_len - 1)
        num_complete = (last + 1) // PAGE_SIZE
        start = tl.load(start_ptr + b * num_kv_heads + k).to(tl.int64)
        if (tl.program_id(0) == 0) & (k == 0) & (b == 0):
            tl.store(sealed_ptr, num_complete)
            if HAS_NEXT:
                next_position = tl.load(sealed_ptr + 1)
                tl.store(sealed_ptr + 1, tl.where(next_position < 0, -1, last + 1))
        end = tl.minimum(end_page, num_complete)
        for page in range(tl.maximum(first_page, start), end, SEAL_TILE):
            pages = page + tl.arange(0, SEAL_TILE).to(tl.int64)
            sketch_rows(key_ptr, row_ptr, scale_ptr, pages, pages < end, key_stride_t, row_stride_p,
                        D, D_PAD, PAGE_SIZE, T_PAD, BITS, False)  # fmt: skip
        # All threads of this program have written before one of them reads.
        tl.debug_barrier()
    if SCORE:
        for page in range(first_page, end_page, PAGE_TILE):
            pages = page + tl.arange(0, PAGE_TILE).to(tl.int64)
            rows = row_ptr + pages * row_stride_p
            for i in range(q_len):
                seq_len = seq_len_of(
                    seq_lens_ptr, b, i, q_len, seq_stride_b, seq_stride_i, step, max_seq_len
                )
                if seq_len > budget_tokens:
                    is_complete = (pages < seq_len // PAGE_SIZE) & (pages < end_page)
                    best = tl.full([PAGE_TILE], float("-inf"), tl.float32)
                    for n in range(N):
                        row = ((b * q_len + i) * num_kv_heads + k) * N + n
                        live = is_complete[:, None]
                        if HAS_MASK:
                            group = k if IS_MAX else k * N + n
                            live = live_tokens(
                                mask_ptr + b * mask_stride_b + i * mask_stride_i
                                + group * NUM_HEADS * mask_stride_h,
                                pages, is_complete, mask_len, mask_stride_h, NUM_HEADS,
                                PAGE_SIZE, T_PAD,
                            )  # fmt: skip
                        score = sketch_scores(rows, is_complete, live,
                                              weights_ptr + row * (2 * D + 8), D, D_PAD,
                                              PAGE_SIZE, T_PAD, BITS)  # fmt: skip
                        score = tl.where(is_complete, score, float("-inf"))
                        best = tl.maximum(best, score, propagate_nan=_ALL)
                        if not IS_MAX:
                            tl.store(scores_ptr + row * num_pages + pages, score,
                                     mask=pages < end_page)  # fmt: skip
                    if IS_MAX:
                        row = (b * q_len + i) * num_kv_heads + k
                        tl.store(scores_ptr + row * num_pages + pages, best, mask=pages < end_page)
