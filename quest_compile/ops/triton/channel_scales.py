"""Scales of channels, bit by bit those of the reference: from pages spread over a cache.

Compiled without contraction; sums over pages and tokens have an order.
"""

import triton
import triton.language as tl

from quest_compile.ops.limits import NUM_SCALE_PAGES
from quest_compile.ops.triton.rows_sketch import load_token, page_means

SCALE_PAGES: tl.constexpr = tl.constexpr(NUM_SCALE_PAGES)


@triton.jit
def floor_to_power_of_two(x):
    power = tl.full([], 1, tl.int64) << tl.arange(0, 32).to(tl.int64)
    return tl.max(tl.where(power <= x, power, 0), axis=0)


@triton.jit
def add_in_order(total, x):
    """total [channels], and the rows of x [pages, channels] one after the other."""
    P: tl.constexpr = x.shape[0]
    index = tl.arange(0, P)[:, None]
    for page in range(P):
        total += tl.sum(tl.where(index == page, x, 0.0), axis=0)
    return total


@triton.jit
def bounded_scales(scale):
    """Far from the ends of float32; no channel gets less than 1/1024 of the largest."""
    smallest = tl.max(scale, axis=0) * 0.0009765625
    return tl.minimum(tl.maximum(tl.maximum(scale, smallest), 1e-12), 1e12)


@triton.jit
def sketch_scales(
    key_ptr, scale_ptr, num_pages, key_stride_t, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_TILE: tl.constexpr
):  # fmt: skip
    """Centre, scale of the means and of the residuals, of pages spread over the first num_pages."""
    d = tl.arange(0, D_PAD)
    count = tl.minimum(num_pages, SCALE_PAGES)
    centre = tl.zeros([D_PAD], tl.float32)
    spread = tl.zeros([D_PAD], tl.float32)
    size = tl.zeros([D_PAD], tl.float32)
    for turn in range(2):
        num_counted = 0
        for first in range(0, count, PAGE_TILE):
            i = first + tl.arange(0, PAGE_TILE).to(tl.int64)
            pages = i * tl.maximum(num_pages, SCALE_PAGES) // SCALE_PAGES
            is_read = (i < count)[:, None] & (d < D)[None, :]
            pointers = key_ptr + (pages * PAGE_SIZE * key_stride_t)[:, None] + d[None, :]
            mean, num_finite, inverse = page_means(pointers, is_read, key_stride_t, PAGE_SIZE)
            is_counted = (i < count) & (num_finite > 0)
            num_counted += tl.sum(is_counted.to(tl.int32), axis=0)
            if turn == 0:
                centre = add_in_order(centre, tl.where(is_counted[:, None], mean, 0.0))
            else:
                away = tl.where(is_counted[:, None], tl.abs(mean - centre[None, :]), 0.0)
                spread = add_in_order(spread, away)
                left = tl.zeros(mean.shape, tl.float32)
                for t in range(PAGE_SIZE):
                    x, is_finite = load_token(pointers, t, key_stride_t, is_read)
                    part = tl.abs(x - mean) * inverse[:, None]
                    left += tl.where(is_finite[:, None], part, 0.0)
                size = add_in_order(size, tl.where(is_counted[:, None], left, 0.0))
        num_counted = tl.maximum(num_counted, 1).to(tl.float32)
        if turn == 0:
            centre = tl.div_rn(centre, num_counted)
        else:
            spread = tl.div_rn(spread, num_counted)
            size = tl.div_rn(size, num_counted)
    tl.store(scale_ptr + d, centre, mask=d < D)
    tl.store(scale_ptr + D + d, bounded_scales(tl.where(d < D, spread, 0.0)), mask=d < D)
    tl.store(scale_ptr + 2 * D + d, bounded_scales(tl.where(d < D, size, 0.0)), mask=d < D)
