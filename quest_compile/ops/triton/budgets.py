"""How many pages a row selects: shares of the pages in use, and of the softmax over their scores.

In integers, as in reference/selection.py, so that no order of sums matters.
"""

import triton
import triton.language as tl

from quest_compile.ops.triton.page_ranks import (
    FORCED,
    NAN,
    is_candidate,
    load_ranks,
    score_of,
)


@triton.jit
def double_of(bits):
    """A float64 that came as the int64 of the same bits: kernels get no float64."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def row_budget(num_used, fraction_bits, page_budget, num_forced_pages):
    """int64: pages that a row with num_used pages selects at most."""
    share = tl.ceil(num_used.to(tl.float64) * double_of(fraction_bits)).to(tl.int64)
    return tl.minimum(tl.maximum(share, num_forced_pages + 1), page_budget)


@triton.jit
def best_of(rank):
    """uint32: the highest rank of a page with a number for a score; 0 without any."""
    is_number = is_candidate(rank) & (rank < NAN)
    return tl.max(tl.where(is_number, rank, 0).to(tl.int64), axis=0)


@triton.jit
def weights_of(rank, best, scale_log2):
    """int64 [pages], rounded as the reference does: 2^30 * 2^-(distance from the best score), or
    without a scale 2^24 * score, scores being shares; NaN has 2^30."""
    if scale_log2 is None:
        share = tl.minimum(tl.maximum(score_of(rank), 0.0) * 16777216.0, 1073741824.0)
        weight = tl.where(rank < NAN, share.to(tl.int64), 1 << 30)
    else:
        distance = (score_of(best.to(tl.uint32)) - score_of(rank)) * scale_log2
        is_far = (rank != best) & (rank < NAN) & (distance > 0)
        units = (tl.minimum(tl.where(is_far, distance, 0.0), 31.0) * 65536.0).to(tl.int64)
        rest = 65536 - units % 65536
        power = 7270536 + tl.zeros(rank.shape, tl.int64)
        power = 27946717 + power * rest // 65536
        power = 129584418 + power * rest // 65536
        power = 372069241 + power * rest // 65536
        power = 536870912 + power * rest // 65536
        weight = power >> (units // 65536)
    return tl.where(is_candidate(rank), weight, 0)


@triton.jit
def load_weights(
    ranks_ptr, rank, weights, tile, num_pages, best, scale_log2, PAGE_TILE: tl.constexpr,
    NUM_TILES: tl.constexpr
):  # fmt: skip
    """Ranks as int64 and weights of a tile: as they are where one tile is all."""
    if NUM_TILES > 1:
        rank = load_ranks(ranks_ptr, rank, tile, num_pages, PAGE_TILE, NUM_TILES)
        return rank.to(tl.int64), weights_of(rank, best, scale_log2)
    else:
        return rank.to(tl.int64), weights


@triton.jit
def top_p_budget(
    ranks_ptr, first_rank, num_pages, top_p_bits, scale_log2, PAGE_TILE: tl.constexpr,
    NUM_TILES: tl.constexpr
):  # fmt: skip
    """int64: forced pages, and the best others until those have top_p of all weight."""
    best = tl.full([], 0, tl.int64)
    num_forced = tl.full([], 0, tl.int64)
    for tile in range(NUM_TILES):
        rank = load_ranks(ranks_ptr, first_rank, tile, num_pages, PAGE_TILE, NUM_TILES)
        best = tl.maximum(best, best_of(rank))
        num_forced += tl.sum((rank == FORCED).to(tl.int64), axis=0)
    first_weights = weights_of(first_rank, best, scale_log2)
    total = tl.full([], 0, tl.int64)
    for tile in range(NUM_TILES):
        _, weights = load_weights(ranks_ptr, first_rank, first_weights, tile, num_pages, best,
                                  scale_log2, PAGE_TILE, NUM_TILES)  # fmt: skip
        total += tl.sum(weights, axis=0)
    # A page is kept if those before it have less than this.
    wanted = tl.ceil(total.to(tl.float64) * double_of(top_p_bits)).to(tl.int64)
    # The largest threshold above which there is as much.
    threshold = tl.full([], 0, tl.int64)
    for digit in range(32):
        higher = threshold + (tl.full([], 1, tl.int64) << (31 - digit))
        weight = tl.full([], 0, tl.int64)
        for tile in range(NUM_TILES):
            rank, weights = load_weights(ranks_ptr, first_rank, first_weights, tile, num_pages,
                                         best, scale_log2, PAGE_TILE, NUM_TILES)  # fmt: skip
            weight += tl.sum(tl.where(rank >= higher, weights, 0), axis=0)
        threshold = tl.where(weight >= wanted, higher, threshold)
    num_above = tl.full([], 0, tl.int64)
    num_ties = tl.full([], 0, tl.int64)
    above = tl.full([], 0, tl.int64)
    of_ties = tl.full([], 0, tl.int64)
    for tile in range(NUM_TILES):
        rank, weights = load_weights(ranks_ptr, first_rank, first_weights, tile, num_pages, best,
                                     scale_log2, PAGE_TILE, NUM_TILES)  # fmt: skip
        is_above = is_candidate(rank) & (rank > threshold)
        is_tie = is_candidate(rank) & (rank == threshold)
        num_above += tl.sum(is_above.to(tl.int64), axis=0)
        num_ties += tl.sum(is_tie.to(tl.int64), axis=0)
        above += tl.sum(tl.where(is_above, weights, 0), axis=0)
        of_ties += tl.sum(tl.where(is_tie, weights, 0), axis=0)
    of_one = tl.maximum(of_ties // tl.maximum(num_ties, 1), 1)
    num_kept = tl.minimum((wanted - above + of_one - 1) // of_one, num_ties)
    return num_forced + num_above + num_kept
