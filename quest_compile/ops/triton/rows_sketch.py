"""Rows of page sketches, bit by bit those of reference_sketch.py.

Compiled without contraction, and sums have an order: over the tokens of a page one after the other,
over the channels as 8 sums side by side, then in pairs.
"""

import triton
import triton.language as tl

from quest_compile.ops import limits

MAX_KEY: tl.constexpr = tl.constexpr(1e11)
NOT_FINITE: tl.constexpr = tl.constexpr(255)
SKETCH_TILE: tl.constexpr = tl.constexpr(limits.SKETCH_TILE)


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
def nearest(x):
    """To the nearest, ties to even, below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def bounded(x):
    return tl.minimum(tl.maximum(x, -MAX_KEY), MAX_KEY)


@triton.jit
def place_of(t, D: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where in a plane the byte of the first 8 channels of token t is, and the bytes from there to
    that of the next 8: tiles of 16 tokens (the last may have 8), in each [D / 8, tokens]."""
    first = t // SKETCH_TILE * SKETCH_TILE
    width = tl.full(t.shape, SKETCH_TILE, tl.int32)
    if PAGE_SIZE // 8 % 2 == 1:
        width = tl.minimum(PAGE_SIZE - first, SKETCH_TILE)
    return first * (D // 8) + t % SKETCH_TILE, width


@triton.jit
def sum_lanes(x):
    """float32 [pages, tokens, 8] -> [pages, tokens]: half and half, until one is left."""
    P: tl.constexpr = x.shape[0]
    T: tl.constexpr = x.shape[1]
    x = tl.sum(tl.reshape(x, [P, T, 2, 4]), axis=2)
    x = tl.sum(tl.reshape(x, [P, T, 2, 2]), axis=2)
    return tl.sum(x, axis=2)


@triton.jit
def load_token(pointers, t, stride_t, is_read):
    """Keys [pages, channels] of token t of each page, and [pages]: are they all finite?"""
    x = tl.load(pointers + t * stride_t, mask=is_read, other=0.0).to(tl.float32)
    return bounded(x), tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=1) > 0


@triton.jit
def page_means(pointers, is_read, stride_t, PAGE_SIZE: tl.constexpr):
    """Of the tokens that are finite: mean [pages, channels], their number [pages] and 1 / that."""
    count = tl.zeros([is_read.shape[0]], tl.int32)
    for t in range(PAGE_SIZE):
        _, is_finite = load_token(pointers, t, stride_t, is_read)
        count += is_finite.to(tl.int32)
    inverse = tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32))
    mean = tl.zeros(is_read.shape, tl.float32)
    for t in range(PAGE_SIZE):
        x, is_finite = load_token(pointers, t, stride_t, is_read)
        mean += tl.where(is_finite[:, None], x * inverse[:, None], 0.0)
    return mean, count, inverse


@triton.jit
def residuals(keys, mean, g, is_finite, is_token):
    """[pages, tokens, 8]: channels 8 g and on, without the mean [pages, groups, 8]; 0 for tokens
    that are not finite."""
    x = tl.load(keys + 8 * g, mask=is_token[:, :, None], other=0.0).to(tl.float32)
    is_group = (tl.arange(0, mean.shape[1]) == g)[None, :, None]
    mean = tl.sum(tl.where(is_group, mean, 0.0), axis=1)
    return tl.where(is_finite[:, :, None], bounded(x) - mean[:, None, :], 0.0)


@triton.jit
def sketch_rows(
    key_ptr, row_ptr, scale_ptr, pages, is_wanted, key_stride_t, row_stride, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, T_PAD: tl.constexpr, BITS: tl.constexpr,
    COMPARE: tl.constexpr
):  # fmt: skip
    """Write the rows of these pages, or compare them: as put does."""
    d, t, c = tl.arange(0, D_PAD), tl.arange(0, T_PAD), tl.arange(0, 8)
    page_ptr = key_ptr + pages * PAGE_SIZE * key_stride_t
    is_read = is_wanted[:, None] & (d < D)[None, :]
    mean, count, _ = page_means(page_ptr[:, None] + d[None, :], is_read, key_stride_t, PAGE_SIZE)
    rows = row_ptr + pages * row_stride
    PLANE: tl.constexpr = PAGE_SIZE * D // 8
    # The mean, around the centre of the channel.
    centre = tl.load(scale_ptr + d, mask=d < D, other=0.0)[None, :]
    mean_scale = tl.load(scale_ptr + D + d, mask=d < D, other=1.0)[None, :]
    deviation = tl.div_rn(mean - centre, mean_scale)
    page_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(deviation), axis=1), 127.0), 1e-15)
    code = nearest(tl.div_rn(deviation, page_scale[:, None]))
    code = tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8).to(tl.uint8, bitcast=True)
    differs = put(rows[:, None] + BITS * PLANE + d[None, :], code, is_read, COMPARE)
    page_scale = tl.where(count == PAGE_SIZE, page_scale, -page_scale)
    # The bits of the tokens, 8 channels at a time.
    mean = tl.reshape(mean, [mean.shape[0], D_PAD // 8, 8])
    is_token = is_wanted[:, None] & (t < PAGE_SIZE)[None, :]
    keys = page_ptr[:, None, None] + (t * key_stride_t)[None, :, None] + c[None, None, :]
    is_finite = is_token
    for g in range(D // 8):
        x = tl.load(keys + 8 * g, mask=is_token[:, :, None], other=0.0).to(tl.float32)
        is_finite = is_finite & (tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=2) > 0)
    place, width = place_of(t, D, PAGE_SIZE)
    planes = rows[:, None] + place[None, :]
    size = tl.zeros([pages.shape[0], T_PAD, 8], tl.float32)
    total = tl.zeros([1, 1, 8], tl.float32)
    for g in range(D // 8):
        scale = tl.load(scale_ptr + 2 * D + 8 * g + c)[None, None, :]
        x = residuals(keys, mean, g, is_finite, is_token)
        size += x * x * tl.div_rn(1.0, scale)
        total += scale
        bits = tl.sum((x >= 0).to(tl.int32) << c[None, None, :], axis=2).to(tl.uint8)
        differs |= put(planes + g * width[None, :], bits, is_token, COMPARE)
    size = sum_lanes(size)
    token_scale = tl.sqrt_rn(tl.div_rn(size, tl.broadcast_to(sum_lanes(total), size.shape)))
    if BITS == 2:
        levels = tl.zeros([pages.shape[0], T_PAD, 8], tl.float32)
        for g in range(D // 8):
            scale = tl.load(scale_ptr + 2 * D + 8 * g + c)[None, None, :]
            x = residuals(keys, mean, g, is_finite, is_token)
            is_outer = tl.abs(x) >= token_scale[:, :, None] * scale
            levels += scale * tl.where(is_outer, 2.25, 0.25)
            bits = tl.sum((is_outer == (x >= 0)).to(tl.int32) << c[None, None, :], axis=2)
            differs |= put(planes + PLANE + g * width[None, :], bits.to(tl.uint8), is_token,
                           COMPARE)  # fmt: skip
        token_scale = tl.sqrt_rn(tl.div_rn(size, sum_lanes(levels)))
    unit = tl.maximum(tl.div_rn(tl.max(token_scale, axis=1), 254.0), 1e-30)
    code = nearest(tl.div_rn(token_scale, unit[:, None])).to(tl.int32)
    code = tl.where(is_finite, code, NOT_FINITE).to(tl.uint8)
    codes = rows + BITS * PLANE + D
    differs |= put(codes[:, None] + t[None, :], code, is_token, COMPARE)
    differs |= put_float(codes + PAGE_SIZE, page_scale, is_wanted, COMPARE)
    return differs | put_float(codes + PAGE_SIZE + 4, unit, is_wanted, COMPARE)
