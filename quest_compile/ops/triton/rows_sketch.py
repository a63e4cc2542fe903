"""Page sketches: rows, bit by bit those of the reference, and their scores.

Rows are made without contraction, and sums have an order: over the tokens of a page one after the
other, over the channels as 8 sums side by side, then in pairs.

A row in registers, of [pages]: codes int8 [pages, T_PAD, D_PAD], bit 1 the sign and bit 0 of the
second plane; codes of the mean int8 [pages, D_PAD]; scales of the tokens, bits of bfloat16 in int32
[pages, T_PAD]; scale of the mean float32 [pages]. F is a RowFormat.
"""

import triton
import triton.language as tl

MAX_KEY: tl.constexpr = tl.constexpr(1e11)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def make_sketch(key_ptr, pages, is_wanted, key_stride_t, F: tl.constexpr):
    P: tl.constexpr = pages.shape[0]
    d, t = tl.arange(0, F.D_PAD), tl.arange(0, F.T_PAD)
    is_in_row = (t < F.PAGE_SIZE)[None, :, None] & (d < F.D)[None, None, :]
    token = (pages * F.PAGE_SIZE)[:, None] + t[None, :]
    x = tl.load(
        key_ptr + (token * key_stride_t)[:, :, None] + d[None, None, :],
        mask=is_wanted[:, None, None] & is_in_row, other=0.0,
    ).to(tl.float32)  # fmt: skip
    is_finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=2) > 0
    x = tl.where(is_finite[:, :, None], tl.minimum(tl.maximum(x, -MAX_KEY), MAX_KEY), 0.0)
    x = tl.reshape(rotate(tl.reshape(x, [P * F.T_PAD, F.D_PAD]), F.D), [P, F.T_PAD, F.D_PAD])
    num_finite = tl.sum((is_finite & (t < F.PAGE_SIZE)[None, :]).to(tl.int32), axis=1)
    total = tl.zeros([P, F.D_PAD], tl.float32)
    for i in range(F.PAGE_SIZE):
        total += tl.sum(tl.where((t == i)[None, :, None], x, 0.0), axis=1)
    mean = total * tl.div_rn(1.0, tl.maximum(num_finite, 1).to(tl.float32))[:, None]
    mean_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(mean), axis=1), 127.0), 1e-30)
    mean_code = nearest_code(tl.div_rn(mean, mean_scale[:, None]))
    x = x - (mean_code * mean_scale[:, None])[:, None, :]
    square = sum_channels(tl.reshape(x * x, [P * F.T_PAD, F.D_PAD]), F.D)
    square = tl.reshape(square, [P, F.T_PAD])
    scale = tl.sqrt_rn(tl.div_rn(square, F.D * 1.0))
    is_positive = x >= 0
    codes = is_positive.to(tl.int8) * 2
    if F.BITS == 2:
        is_outer = tl.abs(x) >= scale[:, :, None]
        codes += (is_outer == is_positive).to(tl.int8)
        level = tl.sum(tl.where(is_in_row, tl.where(is_outer, 2.25, 0.25), 0.0), axis=2)
        scale = tl.sqrt_rn(tl.div_rn(square, tl.maximum(level, 0.25)))
    codes = tl.where(is_in_row & is_finite[:, :, None], codes, 0)
    bits = scale.to(tl.uint32, bitcast=True)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int32)
    bits = tl.where(is_finite, bits, 0x7FC0)
    return codes, mean_code.to(tl.int8), tl.where((t < F.PAGE_SIZE)[None, :], bits, 0), mean_scale


@triton.jit
def rotate(x, D: tl.constexpr):
    """[R, D_PAD]: signs, then sums and differences over blocks of a power of two of channels."""
    R: tl.constexpr = x.shape[0]
    D_PAD: tl.constexpr = x.shape[1]
    word = (tl.arange(0, D_PAD) + 1).to(tl.uint32) * 0x9E3779B1
    word = (word ^ (word >> 15)) * 0x85EBCA77
    x = tl.where((word >> 31)[None, :] == 0, x, -x)
    for i in tl.static_range(8):
        if D % (2 << i) == 0:
            pair = tl.reshape(x, [R, D_PAD // (2 << i), 2, 1 << i])
            is_low = (tl.arange(0, 2) == 0)[None, None, :, None]
            total = tl.sum(pair, axis=2)[:, :, None, :]
            difference = tl.sum(tl.where(is_low, pair, -pair), axis=2)[:, :, None, :]
            x = tl.reshape(tl.where(is_low, total, difference), [R, D_PAD])
    return x


@triton.jit
def sum_channels(x, D: tl.constexpr):
    """[R, D_PAD] -> [R]."""
    R: tl.constexpr = x.shape[0]
    x = tl.reshape(x, [R, x.shape[1] // 8, 8])
    group = tl.arange(0, x.shape[1])[None, :, None]
    sums = tl.zeros([R, 8], tl.float32)
    for g in range(D // 8):
        sums += tl.sum(tl.where(group == g, x, 0.0), axis=1)
    sums = tl.sum(tl.reshape(sums, [R, 2, 4]), axis=1)
    sums = tl.sum(tl.reshape(sums, [R, 2, 2]), axis=1)
    return tl.sum(sums, axis=1)


@triton.jit
def nearest_code(x):
    """To the nearest whole number, ties to even, from -127 to 127; of less than 2^22."""
    return tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, -127.0), 127.0)


@triton.jit
def put_sketch(rows, sketch, is_wanted, F: tl.constexpr, COMPARE: tl.constexpr):
    """Write rows (pointers to bytes), as put does."""
    codes, mean_code, token_scale, mean_scale = sketch
    d, t, i = tl.arange(0, F.D_PAD), tl.arange(0, F.T_PAD), tl.arange(0, 64)
    rows, is_wanted = rows[:, None], is_wanted[:, None]
    differs = put_plane(rows, codes >> 1, is_wanted, F, COMPARE)
    if F.BITS == 2:
        differs |= put_plane(rows + F.SECOND, codes & 1, is_wanted, F, COMPARE)
    mean_code = mean_code.to(tl.uint8, bitcast=True)
    differs |= put(rows + F.PLANE + d[None, :], mean_code, is_wanted & (d < F.D)[None, :], COMPARE)
    rows += F.PLANE + F.D
    is_token = is_wanted & (t < F.TOKENS)[None, :]
    differs |= put_words(rows + 2 * t[None, :], token_scale, is_token, 2, COMPARE)
    rows += 2 * F.TOKENS
    bits = mean_scale.to(tl.int32, bitcast=True)[:, None]
    differs |= put_words(rows, bits, is_wanted, 4, COMPARE)
    is_rest = is_wanted & (i < F.SECOND - F.PLANE - F.D - 2 * F.TOKENS - 4)[None, :]
    zeros = tl.zeros([codes.shape[0], 64], tl.uint8)
    return differs | put(rows + 4 + i[None, :], zeros, is_rest, COMPARE)


@triton.jit
def load_sketch(rows, is_read, F: tl.constexpr):
    d, t = tl.arange(0, F.D_PAD), tl.arange(0, F.T_PAD)
    rows, is_read = rows[:, None], is_read[:, None]
    codes = load_plane(rows, is_read, F) * 2
    if F.BITS == 2:
        codes += load_plane(rows + F.SECOND, is_read, F)
    is_code = is_read & (d < F.D)[None, :]
    mean_code = tl.load(rows + F.PLANE + d[None, :], mask=is_code, other=0)
    rows += F.PLANE + F.D
    is_token = is_read & (t < F.PAGE_SIZE)[None, :]
    token_scale = load_words(rows + 2 * t[None, :], is_token, 2)
    mean_scale = tl.reshape(load_words(rows + 2 * F.TOKENS, is_read, 4), [rows.shape[0]])
    mean_scale = mean_scale.to(tl.float32, bitcast=True)
    return codes, mean_code.to(tl.int8, bitcast=True), token_scale, mean_scale


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
def put_words(pointers, values, is_wanted, SIZE: tl.constexpr, COMPARE: tl.constexpr):
    """The low bytes of int32 [pages, n], wherever a row begins."""
    i = tl.arange(0, SIZE)[None, None, :]
    values = ((values[:, :, None] >> (8 * i)) & 255).to(tl.uint8)
    is_wanted = tl.broadcast_to(is_wanted[:, :, None], values.shape)
    return put(pointers[:, :, None] + i, values, is_wanted, COMPARE)


@triton.jit
def load_words(pointers, is_read, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[None, None, :]
    values = tl.load(pointers[:, :, None] + i, mask=is_read[:, :, None], other=0)
    return tl.sum(values.to(tl.int32) << (8 * i), axis=2)


@triton.jit
def plane_offsets(F: tl.constexpr):
    """Bytes of a plane, [1, T_PAD, D_PAD / 32, 4]: where they are, and which there are."""
    t = tl.arange(0, F.T_PAD)[None, :, None, None]
    c = tl.arange(0, F.D_PAD // 32)[None, None, :, None]
    i = tl.arange(0, 4)[None, None, None, :]
    blocks: tl.constexpr = (F.D + 31) // 32
    offset = (t // 16 * blocks + c) * 64 + t % 16 * 4 + i
    return offset, tl.broadcast_to((t < F.TOKENS) & (c < blocks), offset.shape)


@triton.jit
def put_plane(rows, bits, is_wanted, F: tl.constexpr, COMPARE: tl.constexpr):
    """Bits int8 [pages, T_PAD, D_PAD]: channel 32 * c + 4 * j + i is bit j of byte i of block c."""
    offset, is_byte = plane_offsets(F)
    j = tl.arange(0, 8)[None, None, None, :, None]
    bits = tl.reshape(bits, [bits.shape[0], F.T_PAD, F.D_PAD // 32, 8, 4])
    values = tl.sum(bits.to(tl.int32) << j, axis=3).to(tl.uint8)
    is_wanted = is_wanted[:, :, None, None] & is_byte
    return put(rows[:, :, None, None] + offset, values, is_wanted, COMPARE)


@triton.jit
def load_plane(rows, is_read, F: tl.constexpr):
    offset, is_byte = plane_offsets(F)
    j = tl.arange(0, 8)[None, None, None, :, None]
    is_read = is_read[:, :, None, None] & is_byte
    values = tl.load(rows[:, :, None, None] + offset, mask=is_read, other=0)
    bits = (values[:, :, :, None, :].to(tl.int32) >> j) & 1
    return tl.reshape(bits.to(tl.int8), [rows.shape[0], F.T_PAD, F.D_PAD])


@triton.jit
def query_codes(query_ptr, stride_h, scale, HEADS: tl.constexpr, N_PAD: tl.constexpr,
                F: tl.constexpr):  # fmt: skip
    """Whole numbers, int8 [D_PAD, N_PAD], and what one is worth times scale, float32 [N_PAD]; NaN
    for a query that is not finite."""
    n, d = tl.arange(0, N_PAD), tl.arange(0, F.D_PAD)
    is_read = (n < HEADS)[:, None] & (d < F.D)[None, :]
    query = tl.load(query_ptr + n[:, None] * stride_h + d[None, :], mask=is_read, other=0.0)
    query = rotate(query.to(tl.float32), F.D)
    is_finite = tl.min((tl.abs(query) < float("inf")).to(tl.int32), axis=1) > 0
    query = tl.where(is_finite[:, None], query, 0.0)
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(query), axis=1), 127.0), 1e-30)
    codes = nearest_code(tl.div_rn(query, step[:, None])).to(tl.int8)
    return tl.trans(codes), tl.where(is_finite, step * scale, float("nan"))


@triton.jit
def score_sketch(sketch, query, is_live, F: tl.constexpr):
    """float32 [pages, N_PAD]: log of the sum of exp over the live tokens, is_live being
    [pages, T_PAD, N_PAD], or something that is broadcast to that."""
    codes, mean_code, token_scale, mean_scale = sketch
    query_code, step = query
    P: tl.constexpr = codes.shape[0]
    N_PAD: tl.constexpr = query_code.shape[1]
    if F.BITS == 2:
        # Twice the level.
        level = codes * 2 - 3
    else:
        level = codes - 1
    level = tl.reshape(level.to(tl.int8), [P * F.T_PAD, F.D_PAD])
    of_token = tl.dot(level, query_code, out_dtype=tl.int32).to(tl.float32)
    of_token = tl.reshape(of_token, [P, F.T_PAD, N_PAD])
    of_mean = tl.dot(mean_code, query_code, out_dtype=tl.int32).to(tl.float32)
    of_mean = of_mean * mean_scale[:, None]
    scale = (token_scale << 16).to(tl.float32, bitcast=True) * (1.0 / F.BITS)
    logit = of_token * scale[:, :, None] + of_mean[:, None, :]
    logit = tl.where(is_live, logit * step[None, None, :] * LOG2_E, float("-inf"))
    top = tl.max(logit, axis=1)
    base = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return (base + tl.log2(tl.sum(tl.exp2(logit - base[:, None, :]), axis=1))) * LN_2
