"""Rows of minima and maxima, in the dtype of the keys, and their scores.

A row in registers, of [pages]: minimum and maximum, [pages, D_PAD] each. F is a RowFormat.
"""

import triton
import triton.language as tl

_ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def make_minmax(key_ptr, pages, is_wanted, key_stride_t, F: tl.constexpr):
    """NaN stays NaN, -0.0 becomes 0.0 (adding 0 leaves one zero). 4 tokens are loaded at once."""
    d = tl.arange(0, F.D_PAD)
    is_read = is_wanted[:, None] & (d < F.D)[None, :]
    pointers = key_ptr + (pages * F.PAGE_SIZE)[:, None] * key_stride_t + d[None, :]
    low = tl.full([pages.shape[0], F.D_PAD], float("inf"), tl.float32)
    high = tl.full([pages.shape[0], F.D_PAD], float("-inf"), tl.float32)
    for token in range(0, F.PAGE_SIZE, 4):
        for i in tl.static_range(4):
            x = tl.load(pointers + (token + i) * key_stride_t, mask=is_read, other=0.0)
            low = tl.minimum(low, x.to(tl.float32), propagate_nan=_ALL)
            high = tl.maximum(high, x.to(tl.float32), propagate_nan=_ALL)
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    return rounded(low + 0.0, dtype), rounded(high + 0.0, dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 values in ``dtype``, to the nearest; every NaN is the same one."""
    bits = x.to(tl.uint32, bitcast=True)
    if dtype == tl.float32:
        bits = tl.where(x != x, 0x7FC00000, bits.to(tl.int32, bitcast=True))
    elif dtype == tl.bfloat16:
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x != x, 0x7FC0, bits.to(tl.int32)).to(tl.int16)
    else:
        bits = tl.where(x != x, 0x7E00, x.to(dtype).to(tl.int16, bitcast=True)).to(tl.int16)
    return bits.to(dtype, bitcast=True)


@triton.jit
def put_minmax(rows, row, is_wanted, F: tl.constexpr, COMPARE: tl.constexpr):
    """Write rows (pointers), or compare them, as put_rows does."""
    low, high = row
    d = tl.arange(0, F.D_PAD)
    pointers = rows[:, None] + d[None, :]
    is_wanted = is_wanted[:, None] & (d < F.D)[None, :]
    if COMPARE:
        bits: tl.constexpr = tl.int32 if low.dtype == tl.float32 else tl.int16
        stored_low = tl.load(pointers, mask=is_wanted, other=0.0).to(bits, bitcast=True)
        stored_high = tl.load(pointers + F.D, mask=is_wanted, other=0.0).to(bits, bitcast=True)
        differs = stored_low != low.to(bits, bitcast=True)
        differs = differs | (stored_high != high.to(bits, bitcast=True))
        return tl.max(tl.max((differs & is_wanted).to(tl.int32), axis=1), axis=0)
    else:
        tl.store(pointers, low, mask=is_wanted)
        tl.store(pointers + F.D, high, mask=is_wanted)
        return 0


@triton.jit
def load_minmax(rows, is_read, F: tl.constexpr):
    d = tl.arange(0, F.D_PAD)
    pointers = rows[:, None] + d[None, :]
    is_read = is_read[:, None] & (d < F.D)[None, :]
    low = tl.load(pointers, mask=is_read, other=0.0)
    return low, tl.load(pointers + F.D, mask=is_read, other=0.0)


@triton.jit
def score_minmax(
    row, query_ptr, stride_h, scale, N: tl.constexpr, N_PAD: tl.constexpr, HEADS: tl.constexpr,
    F: tl.constexpr
):  # fmt: skip
    """float32 [pages, N_PAD]: scale times the bounds of N sums of HEADS query heads.

    max(q * low, q * high) is min(q, 0) * low + max(q, 0) * high."""
    low, high = row[0].to(tl.float32), row[1].to(tl.float32)
    d, index = tl.arange(0, F.D_PAD), tl.arange(0, N_PAD)[None, :]
    score = tl.zeros([low.shape[0], N_PAD], tl.float32)
    for n in range(N):
        of_low = tl.zeros([F.D_PAD], tl.float32)
        of_high = tl.zeros([F.D_PAD], tl.float32)
        for head in range(n * HEADS, (n + 1) * HEADS):
            q = tl.load(query_ptr + head * stride_h + d, mask=d < F.D, other=0.0).to(tl.float32)
            of_low += tl.minimum(q, 0.0, propagate_nan=_ALL)
            of_high += tl.maximum(q, 0.0, propagate_nan=_ALL)
        bound = tl.sum(low * of_low[None, :] + high * of_high[None, :], axis=1)
        score = tl.where(index == n, bound[:, None], score)
    return score * scale
