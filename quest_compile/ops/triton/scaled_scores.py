"""Scores of sketches: weights of a query, and what they make of rows.

Weights of one query, float32 [2 * D + 8], in units of log2: what the bits of a token are multiplied
with, what the mean of a page is, and what all tokens share.
"""

import triton
import triton.language as tl

from quest_compile.ops.triton.rows_sketch import NOT_FINITE, get_float, place_of

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def write_weights(
    weights_ptr, query_ptr, scale_ptr, stride_h, scale, HEADS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr
):  # fmt: skip
    """For the score of the mean of HEADS query heads."""
    d = tl.arange(0, D_PAD)
    total = tl.zeros([D_PAD], tl.float32)
    for head in range(HEADS):
        total += tl.load(query_ptr + head * stride_h + d, mask=d < D, other=0.0).to(tl.float32)
    total = total * (scale * LOG2_E / HEADS)
    is_finite = tl.min((tl.abs(total) < float("inf")).to(tl.int32), axis=0) > 0
    total = tl.where(is_finite, total, 0.0)
    centre = tl.load(scale_ptr + d, mask=d < D, other=0.0)
    of_mean = total * tl.load(scale_ptr + D + d, mask=d < D, other=0.0)
    of_bits = total * tl.load(scale_ptr + 2 * D + d, mask=d < D, other=0.0)
    offset = tl.where(is_finite, tl.sum(total * centre, axis=0), float("nan"))
    tl.store(weights_ptr + d, of_bits, mask=d < D)
    tl.store(weights_ptr + D + d, of_mean, mask=d < D)
    tl.store(weights_ptr + 2 * D, offset)


@triton.jit
def load_codes(pointers, is_read):
    codes = tl.load(pointers, mask=is_read, other=0)
    return codes.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def live_tokens(
    mask_ptr, pages, is_read, mask_len, mask_stride_h, NUM_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, T_PAD: tl.constexpr
):  # fmt: skip
    """bool [pages, tokens]: which positions does any of NUM_HEADS heads attend?"""
    t = tl.arange(0, T_PAD)
    position = pages[:, None] * PAGE_SIZE + t[None, :]
    is_inside = is_read[:, None] & (t < PAGE_SIZE)[None, :] & (position < mask_len)
    found = tl.zeros(position.shape, tl.int8)
    for head in range(NUM_HEADS):
        pointers = mask_ptr + head * mask_stride_h + position
        found |= tl.load(pointers, mask=is_inside, other=0).to(tl.int8)
    return found != 0


@triton.jit
def sum_signs(plane, is_read, weights_ptr, D: tl.constexpr, J_PAD: tl.constexpr):
    """float32 [pages, tokens]: the weights of the channels whose bit is set, less the others'.
    plane: pointers [pages, groups of 8 channels, tokens]."""
    j = tl.arange(0, J_PAD)
    is_group = j < D // 8
    is_byte = is_read[:, None, :] & is_group[None, :, None]
    bits = tl.load(plane, mask=is_byte, other=0)
    total = tl.zeros(bits.shape, tl.float32)
    for i in tl.static_range(8):
        weight = tl.load(weights_ptr + 8 * j + i, mask=is_group, other=0.0)[None, :, None]
        total += tl.where((bits & (1 << i)) != 0, weight, -weight)
    return tl.sum(total, axis=1)


@triton.jit
def sketch_scores(
    rows, is_read, live, weights_ptr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    T_PAD: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """float32 [pages] of rows (pointers): log of the sum of exp over the live tokens."""
    J_PAD: tl.constexpr = D_PAD // 8
    PLANE: tl.constexpr = PAGE_SIZE * D // 8
    d, j, t = tl.arange(0, D_PAD), tl.arange(0, J_PAD), tl.arange(0, T_PAD)
    is_token = is_read[:, None] & (t < PAGE_SIZE)[None, :]
    place, width = place_of(t, D, PAGE_SIZE)
    plane = rows[:, None, None] + (place[None, :] + j[:, None] * width[None, :])[None, :, :]
    of_bits = sum_signs(plane, is_token, weights_ptr, D, J_PAD)
    if BITS == 2:
        of_bits += 0.5 * sum_signs(plane + PLANE, is_token, weights_ptr, D, J_PAD)
    mean_ptr = rows + BITS * PLANE
    is_code = is_read[:, None] & (d < D)[None, :]
    mean = load_codes(mean_ptr[:, None] + d[None, :], is_code)
    of_mean = tl.load(weights_ptr + D + d, mask=d < D, other=0.0)[None, :]
    page_scale = get_float(mean_ptr + D + PAGE_SIZE, is_read)
    shared = tl.sum(mean * of_mean, axis=1) * tl.abs(page_scale) + tl.load(weights_ptr + 2 * D)
    code = tl.load(mean_ptr[:, None] + D + t[None, :], mask=is_token, other=0).to(tl.int32)
    token_scale = code.to(tl.float32) * get_float(mean_ptr + D + PAGE_SIZE + 4, is_read)[:, None]
    logit = tl.fma(of_bits, token_scale, tl.broadcast_to(shared[:, None], of_bits.shape))
    is_odd = (code == NOT_FINITE) & (page_scale < 0)[:, None]
    logit = tl.where(is_odd, float("nan"), logit)
    logit = tl.where(live & is_token, logit, float("-inf"))
    is_nan = tl.max((logit != logit).to(tl.int32), axis=1) > 0
    top = tl.max(tl.where(logit == logit, logit, float("-inf")), axis=1)
    base = tl.where(top == float("-inf"), 0.0, top)
    score = (base + tl.log2(tl.sum(tl.exp2(logit - base[:, None]), axis=1))) * 0.6931471805599453
    return tl.where(is_nan, float("nan"), score)
