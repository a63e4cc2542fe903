"""Rows of bounds of pages as int8, bit by bit those of reference.py.

Compiled without contraction: products are rounded before they are added.
"""

import triton
import triton.language as tl

from quest_compile.ops.triton.rows import page_min_max


@triton.jit
def put(pointers, values, is_wanted, COMPARE: tl.constexpr):
    """Write bytes; or with COMPARE write nothing, and say (int32) if other ones are stored."""
    if COMPARE:
        stored = tl.load(pointers, mask=is_wanted, other=0)
        differs = ((stored != values) & is_wanted).to(tl.int32)
        return tl.max(tl.reshape(differs, [differs.numel]), axis=0)
    else:
        tl.store(pointers, values, mask=is_wanted)
        return 0


@triton.jit
def put_float(pointers, values, is_wanted, COMPARE: tl.constexpr):
    """The same of float32 values [pages], which need no alignment in a row of bytes."""
    i = tl.arange(0, 4)
    bits = values.to(tl.uint32, bitcast=True)
    bytes_ = ((bits[:, None] >> (8 * i)[None, :].to(tl.uint32)) & 255).to(tl.uint8)
    is_wanted = tl.broadcast_to(is_wanted[:, None], bytes_.shape)
    return put(pointers[:, None] + i[None, :], bytes_, is_wanted, COMPARE)


@triton.jit
def get_float(pointers, is_wanted):
    """What put_float wrote."""
    i = tl.arange(0, 4)
    bytes_ = tl.load(pointers[:, None] + i[None, :], mask=is_wanted[:, None], other=0)
    bits = tl.sum(bytes_.to(tl.uint32) << (8 * i)[None, :].to(tl.uint32), axis=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def int8_rows(
    key_ptr, row_ptr, scale_ptr, pages, is_wanted, key_stride_t, row_stride, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, COMPARE: tl.constexpr
):  # fmt: skip
    """Write the rows of these pages, or compare them: as put does.

    126 leaves room for the rounding of the factors themselves. NaN or infinity: the scale is NaN.
    """
    d = tl.arange(0, D_PAD)
    low, high = page_min_max(key_ptr, pages, is_wanted, key_stride_t, d, D, PAGE_SIZE, 4)
    channel_scale = tl.load(scale_ptr + d, mask=d < D, other=1.0)[None, :]
    size = tl.div_rn(tl.maximum(tl.abs(low), tl.abs(high)), channel_scale)
    size = tl.where((low == low) & (high == high), size, float("inf"))
    page_scale = tl.maximum(tl.div_rn(tl.max(size, axis=1), 126.0), 1e-15)
    is_finite = page_scale < float("inf")
    scale = tl.where(is_finite, page_scale, 1.0)[:, None] * channel_scale
    least = tl.floor(tl.div_rn(low, scale))
    least = tl.where(least * scale > low, least - 1.0, least)
    most = tl.ceil(tl.div_rn(high, scale))
    most = tl.where(most * scale < high, most + 1.0, most)
    is_byte = is_wanted[:, None] & (d < D)[None, :]
    is_code = is_finite[:, None] & (d < D)[None, :]
    rows = row_ptr + pages * row_stride
    pointers = rows[:, None] + d[None, :]
    codes = tl.where(is_code, least, 0.0).to(tl.int8).to(tl.uint8, bitcast=True)
    differs = put(pointers, codes, is_byte, COMPARE)
    codes = tl.where(is_code, most, 0.0).to(tl.int8).to(tl.uint8, bitcast=True)
    differs |= put(pointers + D, codes, is_byte, COMPARE)
    nan = tl.full(page_scale.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    page_scale = tl.where(is_finite, page_scale, nan)
    differs |= put_float(rows + 2 * D, page_scale, is_wanted, COMPARE)
    padding = tl.zeros(page_scale.shape, tl.float32)
    return differs | put_float(rows + 2 * D + 4, padding, is_wanted, COMPARE)
