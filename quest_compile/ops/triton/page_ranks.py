"""Ranks of pages: what is selected first. Forced pages, then scores, and 0 for what cannot be."""

import triton
import triton.language as tl

# The rank of pages that are selected whatever their score; that of NaN is one below.
FORCED: tl.constexpr = tl.constexpr(0xFFFFFFFF)
NAN: tl.constexpr = tl.constexpr(0xFFFFFFFE)


@triton.jit
def rank_of(score):
    """uint32, in the order of the scores; NaN is the highest."""
    # Adding 0 makes one zero of two. The bits of negative floats are in descending order.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    rank = tl.where(bits < 0x80000000, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    return tl.where(score != score, NAN, rank)


@triton.jit
def score_of(rank):
    """The inverse, of numbers."""
    bits = tl.where(rank >= 0x80000000, rank ^ 0x80000000, rank ^ 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def is_candidate(rank):
    return (rank > 0) & (rank < FORCED)


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
    rank = rank_of(tl.load(scores_ptr + pages, mask=is_live, other=0.0))
    rank = tl.where(is_forced, FORCED, rank)
    return tl.where(is_live, rank, 0).to(tl.uint32), tl.sum(is_live.to(tl.int32), axis=0)


@triton.jit
def load_ranks(ranks_ptr, rank, tile, num_pages, PAGE_TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    """Those of a tile: as they are where one tile is all."""
    if NUM_TILES > 1:
        page = tl.arange(0, PAGE_TILE) + tile * PAGE_TILE
        return tl.load(ranks_ptr + page, mask=page < num_pages, other=0)
    else:
        return rank
