"""Scores of group_reduce="softmax": shares of each head's softmax over the pages, joined."""

import triton
import triton.language as tl


@triton.jit
def weights_of_head(score, best):
    """exp(score - best); 0 for pages that do not count, which have -inf, and for NaN."""
    weight = tl.where(score == best, 1.0, tl.exp(score - best))
    return tl.where(score > float("-inf"), weight, 0.0)


@triton.jit
def join_heads(
    scores_ptr, shares_ptr, num_pages, N: tl.constexpr, PAGE_TILE: tl.constexpr,
    NUM_TILES: tl.constexpr
):  # fmt: skip
    """float32 [N, num_pages] -> [num_pages]: NaN where it is the score of a head, -inf for pages
    that count for none. Sums have an order that the number of pages decides."""
    pages = tl.arange(0, PAGE_TILE)
    for n in range(N):
        best = float("-inf")
        for tile in range(NUM_TILES):
            page = pages + tile * PAGE_TILE
            score = tl.load(scores_ptr + page, mask=page < num_pages, other=float("-inf"))
            score = tl.where(score == score, score, float("-inf"))
            best = tl.maximum(best, tl.max(score, axis=0))
        total = 0.0
        for tile in range(NUM_TILES):
            page = pages + tile * PAGE_TILE
            score = tl.load(scores_ptr + page, mask=page < num_pages, other=float("-inf"))
            total += tl.sum(weights_of_head(score, best), axis=0)
        for tile in range(NUM_TILES):
            page = pages + tile * PAGE_TILE
            score = tl.load(scores_ptr + page, mask=page < num_pages, other=float("-inf"))
            share = weights_of_head(score, best) / tl.maximum(total, 1.0)
            share = tl.where(score == score, share, float("nan"))
            share = tl.where(score == float("-inf"), float("-inf"), share)
            if n > 0:
                others = tl.load(shares_ptr + page, mask=page < num_pages)
                both = tl.where(others == float("-inf"), share, others + share)
                share = tl.where(score == float("-inf"), others, both)
            tl.store(shares_ptr + page, share, mask=page < num_pages)
        tl.debug_barrier()
        scores_ptr += num_pages


@triton.jit
def join_scores(
    scores_ptr, shares_ptr, num_pages, N: tl.constexpr, PAGE_TILE: tl.constexpr,
    NUM_TILES: tl.constexpr
):  # fmt: skip
    """Grid (rows): join_heads alone."""
    row = tl.program_id(0).to(tl.int64)
    join_heads(scores_ptr + row * N * num_pages, shares_ptr + row * num_pages, num_pages, N,
               PAGE_TILE, NUM_TILES)  # fmt: skip
