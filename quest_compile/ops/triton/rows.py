"""Device functions that several kernels share: lengths of rows, rows of pages in the dtype of keys.

A row is one query of one batch row. Kernels are launched over what the cache can hold; how much of
it is in use is read on the device.
"""

import triton
import triton.language as tl

_ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def seq_len_of(seq_lens_ptr, b, i, q_len, stride_b, stride_i, step, max_seq_len):
    """Of query i of batch row b, in [1, max_seq_len]; ``step`` 1: query i stands q_len - 1 - i
    before the end; 0: seq_lens has a value per query."""
    seq_len = tl.load(seq_lens_ptr + b * stride_b + i * stride_i).to(tl.int64)
    seq_len = seq_len - (q_len - 1 - i) * step
    return tl.minimum(tl.maximum(seq_len, 1), max_seq_len)


@triton.jit
def page_min_max(
    key_ptr, pages, is_wanted, stride_t, d, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    UNROLL: tl.constexpr
):  # fmt: skip
    """float32 [pages, d] twice; NaN stays NaN, -0.0 becomes 0.0 (adding 0 leaves one zero).
    UNROLL tokens are loaded at once."""
    is_read = is_wanted[:, None] & (d < D)[None, :]
    pointers = key_ptr + (pages * PAGE_SIZE)[:, None] * stride_t + d[None, :]
    low = tl.full([pages.shape[0], d.shape[0]], float("inf"), tl.float32)
    high = tl.full([pages.shape[0], d.shape[0]], float("-inf"), tl.float32)
    for token in range(0, PAGE_SIZE, UNROLL):
        for i in tl.static_range(UNROLL):
            x = tl.load(pointers + (token + i) * stride_t, mask=is_read, other=0.0).to(tl.float32)
            low = tl.minimum(low, x, propagate_nan=_ALL)
            high = tl.maximum(high, x, propagate_nan=_ALL)
    return low + 0.0, high + 0.0


@triton.jit
def bits_of(x, dtype: tl.constexpr):
    """Of float32 values rounded to ``dtype``, to the nearest; every NaN is the same one."""
    bits = x.to(tl.uint32, bitcast=True)
    if dtype == tl.float32:
        return tl.where(x != x, 0x7FC00000, bits.to(tl.int32, bitcast=True))
    elif dtype == tl.bfloat16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded.to(tl.int32)).to(tl.int16)
    else:
        return tl.where(x != x, 0x7E00, x.to(dtype).to(tl.int16, bitcast=True)).to(tl.int16)


@triton.jit
def is_stale(
    key_ptr, summary_ptr, start, first_written, key_stride_t, summary_stride_p, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr
):  # fmt: skip
    """int32: do some of the pages before ``start`` have other keys than when they were sealed?"""
    d = tl.arange(0, D_PAD)
    sample = tl.arange(0, 4)
    spread = first_written * 2654435761 % 4294967296 + 40503 * (sample - 1)
    pages = tl.where(sample == 0, start - 1, spread % tl.maximum(start, 1))
    pages = tl.maximum(pages, 0)
    is_wanted = (sample >= 0) & (start > 0)
    low, high = page_min_max(key_ptr, pages, is_wanted, key_stride_t, d, D, PAGE_SIZE, 8)
    pointers = summary_ptr + pages[:, None] * summary_stride_p + d[None, :]
    is_read = is_wanted[:, None] & (d < D)[None, :]
    dtype: tl.constexpr = summary_ptr.dtype.element_ty
    bits: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
    old_low = tl.load(pointers, mask=is_read, other=0.0).to(bits, bitcast=True)
    old_high = tl.load(pointers + D, mask=is_read, other=0.0).to(bits, bitcast=True)
    differs = (bits_of(low, dtype) != old_low) | (bits_of(high, dtype) != old_high)
    return tl.max(tl.max((differs & is_read).to(tl.int32), axis=1), axis=0)


@triton.jit
def seal(
    key_ptr, summary_ptr, pages, is_new, key_stride_t, summary_stride_p, is_stored, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr
):  # fmt: skip
    """Summarise these pages; write the summaries where ``is_stored``."""
    d = tl.arange(0, D_PAD)
    low, high = page_min_max(key_ptr, pages, is_new, key_stride_t, d, D, PAGE_SIZE, 4)
    pointers = summary_ptr + pages[:, None] * summary_stride_p + d[None, :]
    is_written = (is_new & is_stored)[:, None] & (d < D)[None, :]
    dtype: tl.constexpr = summary_ptr.dtype.element_ty
    low = bits_of(low, dtype).to(dtype, bitcast=True)
    high = bits_of(high, dtype).to(dtype, bitcast=True)
    tl.store(pointers, low, mask=is_written)
    tl.store(pointers + D, high, mask=is_written)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def finish_update(
    key_ptr, summary_ptr, last_ptr, sealed_ptr, stale_ptr, b, k, is_first_of_head, is_first,
    key_stride_b, key_stride_h, key_stride_t, summary_stride_b, summary_stride_h, summary_stride_p,
    num_kv_heads, max_seq_len, HAS_NEXT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PAGE_TILE: tl.constexpr
):  # fmt: skip
    """What update_and_score leaves to a later launch, when nothing reads the old state any more:
    num_sealed, and the summaries of heads that were found stale."""
    last = tl.minimum(tl.maximum(tl.load(last_ptr), 0), max_seq_len - 1)
    num_complete = (last + 1) // PAGE_SIZE
    if is_first:
        tl.store(sealed_ptr, num_complete)
        if HAS_NEXT:
            next_position = tl.load(sealed_ptr + 1)
            tl.store(sealed_ptr + 1, tl.where(next_position < 0, -1, last + 1))
    if is_first_of_head:
        if tl.load(stale_ptr + b * num_kv_heads + k) != 0:
            for page in range(0, num_complete, PAGE_TILE):
                pages = page + tl.arange(0, PAGE_TILE).to(tl.int64)
                seal(
                    key_ptr + b * key_stride_b + k * key_stride_h,
                    summary_ptr + b * summary_stride_b + k * summary_stride_h,
                    pages, pages < num_complete, key_stride_t, summary_stride_p, True,
                    D, D_PAD, PAGE_SIZE,
                )  # fmt: skip
