"""Page sketches in plain torch: the mean of a page in 8 bits, and for each of its tokens one or two
bits per channel of what is left, with a scale.

A row is a function of the keys and of channel_scale, bit for bit: sums have an order, and products
are rounded before they are added. Shape suffixes: those of reference.py; L levels of the token's
bits, J bytes of 8 channels each.

channel_scale [B, K, 3, D]: centre of the channel, scale of the means, scale of the residuals.
"""

import torch

from quest_compile.ops.limits import SKETCH_TILE

_MAX_KEY = 1e11
_SCALE_RANGE = 1e-12, 1e12
# Code of a token with a NaN or infinity; others are below.
_NOT_FINITE = 255
_PAGES_AT_A_TIME = 1024


def page_rows(keys, channel_scale, sketch_bits):
    """keys [B, K, P, T, D] -> uint8 [B, K, P, bytes_per_page], in this order: a plane of bits for
    each level, the mean as int8 [D], token codes uint8 [T], scale of the mean and of the tokens.

    A scale of the mean below zero says that the page has a token that is not finite.
    """
    centre, mean_scale, scale = channel_scale[:, :, None].unbind(3)
    mean, residual, is_finite = _split(keys)
    deviation = (mean - centre) / mean_scale
    page_scale = (deviation.abs().amax(-1, keepdim=True) / 127.0).clamp(min=1e-15)
    mean_code = (deviation / page_scale).round().clamp(-127, 127)
    page_scale = torch.where(is_finite.all(-1, keepdim=True), page_scale, -page_scale)
    scale = scale[..., None, :]
    # What a token's bits stand for is as long as what they were made of, the channels being
    # weighted: between those that lengths in the key and in units of the scales would have.
    size = _sum_channels(residual * residual * (1.0 / scale))
    is_positive = residual >= 0
    token_scale = root(size / _sum_channels(scale))
    planes = [is_positive]
    if sketch_bits == 2:
        # Four even levels one deviation apart, which fits a normal distribution.
        is_outer = residual.abs() >= token_scale[..., None] * scale
        planes.append(is_outer == is_positive)
        token_scale = root(size / _sum_channels(scale * torch.where(is_outer, 2.25, 0.25)))
    unit = (token_scale.amax(-1, keepdim=True) / 254.0).clamp(min=1e-30)
    code = torch.where(is_finite, (token_scale / unit).round(), _NOT_FINITE)
    values = [mean_code.to(torch.int8), code.to(torch.uint8), page_scale, unit]
    parts = [*map(_pack, planes), *(x.contiguous().view(torch.uint8) for x in values)]
    return torch.cat(parts, -1)


def channel_scales(keys, is_counted):
    """float32 [B, K, 3, D] of pages keys [B, K, P, T, D], those with is_counted [P]."""
    mean, residual, is_finite = _split(keys)
    is_counted = is_counted & is_finite.any(-1)
    count = is_counted.sum(-1)[..., None].clamp(min=1).float()

    def average(values):
        values = values.where(is_counted[..., None], 0)
        return sum_in_order(values.unbind(2)) / count

    centre = average(mean)
    spread = average((mean - centre[:, :, None]).abs())
    inverse = _inverse_count(is_finite)
    deviation = average(sum_in_order((residual.abs() * inverse).unbind(-2)))
    return torch.stack([centre, _bounded(spread), _bounded(deviation)], 2)


def score_pages(query_BKGD, page_summary, channel_scale, live_BKGPT, *, page_size, sketch_bits,
                group_reduce, scale):  # fmt: skip
    """[B, S, P]: log of the sum of exp(scale * query.key) over the live tokens of each page, the
    product being estimated from the sketch. live_BKGPT: bool, may be broadcast, or None."""
    query_BKGD = query_BKGD * scale
    query_BKGD = query_BKGD.masked_fill(~query_BKGD.isfinite().all(-1, keepdim=True), torch.nan)
    if group_reduce == "sum":
        query_BKGD = query_BKGD.mean(2, keepdim=True)
    parts = []
    for first in range(0, page_summary.shape[2], _PAGES_AT_A_TIME):
        rows = page_summary[:, :, first : first + _PAGES_AT_A_TIME]
        logit_BKGPT = _logits(query_BKGD, rows, channel_scale, page_size, sketch_bits)
        if live_BKGPT is not None:
            live = live_BKGPT[..., first : first + _PAGES_AT_A_TIME, :]
            logit_BKGPT = logit_BKGPT.masked_fill(~live, -torch.inf)
        parts.append(logit_BKGPT.logsumexp(-1))
    score_BKGP = torch.cat(parts, -1)
    return score_BKGP.amax(2) if group_reduce == "max" else score_BKGP.flatten(1, 2)


def _logits(query_BKGD, rows, channel_scale, page_size, sketch_bits):
    head_dim = query_BKGD.shape[-1]
    dtype = query_BKGD.dtype
    centre, mean_scale, scale = (x[:, :, None] for x in channel_scale.to(dtype).unbind(2))
    sizes = [page_size * head_dim // 8] * sketch_bits + [head_dim, page_size, 4, 4]
    *planes, mean_code, code, page_scale, unit = rows.split(sizes, -1)
    page_scale, unit = (x.contiguous().view(torch.float32).to(dtype) for x in (page_scale, unit))
    level_BKPTD = _unpack(planes[0], page_size).to(dtype) * 2 - 1
    if sketch_bits == 2:
        level_BKPTD = level_BKPTD + _unpack(planes[1], page_size).to(dtype) - 0.5
    mean_BKPD = mean_code.view(torch.int8).to(dtype)
    of_mean_BKGP = torch.stack(
        [m @ q.mT for q, m in zip(query_BKGD * mean_scale, mean_BKPD, strict=True)]
    ).mT * page_scale.abs().transpose(-1, -2)
    of_token_BKGPT = torch.stack(
        [
            (x.flatten(1, 2) @ q.mT).mT.unflatten(-1, x.shape[1:3])
            for q, x in zip(query_BKGD * scale, level_BKPTD, strict=True)
        ]
    )
    is_odd = (code == _NOT_FINITE) & (page_scale < 0)
    token_scale = (code.to(dtype) * unit).masked_fill(is_odd, torch.nan)
    offset_BKG = (query_BKGD * centre).sum(-1)
    return (
        of_token_BKGPT * token_scale[:, :, None]
        + of_mean_BKGP[..., None]
        + offset_BKG[..., None, None]
    )


def _split(keys):
    """Mean of the tokens of each page that are finite, what is left of those, which they are."""
    keys = keys.float()
    is_finite = keys.isfinite().all(-1)
    keys = keys.where(is_finite[..., None], 0).clamp(-_MAX_KEY, _MAX_KEY)
    mean = sum_in_order((keys * _inverse_count(is_finite)).unbind(-2))
    residual = (keys - mean[..., None, :]).where(is_finite[..., None], 0)
    return mean, residual, is_finite


def _inverse_count(is_finite):
    return (1.0 / is_finite.sum(-1).clamp(min=1).float())[..., None, None]


def _sum_channels(x):
    """Over the last dimension: 8 sums side by side, then in pairs."""
    sums = sum_in_order(x.unflatten(-1, (-1, 8)).unbind(-2))
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums[..., 0]


def _bounded(scale):
    """Far from the ends of float32; no channel gets less than 1/1024 of the largest."""
    smallest, largest = _SCALE_RANGE
    floor = scale.amax(-1, keepdim=True) * 2.0**-10
    return torch.maximum(scale, floor).clamp(smallest, largest)


def _pack(bits):
    """bool [..., T, D] -> uint8 [..., T * D / 8]: tiles of 16 tokens (the last may have 8), in each
    [D / 8, tokens], bit i of a byte being channel i of its 8."""
    weight = 2 ** torch.arange(8, device=bits.device)
    bytes_TJ = (bits.unflatten(-1, (-1, 8)) * weight).sum(-1).to(torch.uint8)
    return torch.cat([x.mT.flatten(-2) for x in bytes_TJ.split(SKETCH_TILE, -2)], -1)


def _unpack(plane, page_size):
    """The inverse: uint8 [..., T * D / 8] -> bits as uint8 [..., T, D]."""
    num_bytes = plane.shape[-1] // page_size
    tiles = plane.split(SKETCH_TILE * num_bytes, -1)
    bytes_TJ = torch.cat([x.unflatten(-1, (num_bytes, -1)).mT for x in tiles], -2)
    return (bytes_TJ[..., None] >> torch.arange(8, device=plane.device)).bitwise_and(1).flatten(-2)


def root(x):
    """Rounded once, which sqrt in float32 is not on every machine."""
    return x.double().sqrt().float()


def sum_in_order(values):
    total = 0.0
    for value in values:
        total = total + value
    return total
