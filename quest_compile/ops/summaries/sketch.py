"""Page sketches in plain torch: the mean of a page in 8 bits, and of each of its tokens what is
left in one or two bits per channel, with one scale.

Keys are rotated first, so that no channel stands out and one scale per token will do. A row is a
function of the keys of its page alone, bit for bit: sums have an order, products are rounded before
they are added. Shape suffixes: those of ops/reference; I tiles of 16 tokens, C blocks of 32
channels.

Row, uint8 [bytes_per_page]: plane of signs, mean int8 [D], scale of each token bfloat16 [16 * I],
scale of the mean float32, zeros up to a multiple of 64 bytes; with two bits a second plane.
Plane: [I, C, 16 tokens, 4 bytes], bit j of byte i being channel 32 * c + 4 * j + i.
"""

import torch

from quest_compile.ops.summaries.row import Row

TILE, BLOCK, LINE = 16, 32, 64
_MAX_KEY = 1e11
_PAGES_AT_A_TIME = 1024


class Sketch:
    scores_tokens = True

    def row(self, head_dim, dtype, page_format):
        size = row_bytes(head_dim, page_format.page_size, page_format.sketch_bits)
        return Row((size,), torch.uint8, "bytes_per_page")

    def build(self, keys, page_format):
        return page_rows(keys, page_format.sketch_bits)

    def score(self, query_BKGD, page_summary, live_BKGPT, page_format, scale):
        """Log of the sum of exp(scale * query.key) over the live tokens of each page, the product
        being estimated."""
        parts = []
        for first in range(0, page_summary.shape[2], _PAGES_AT_A_TIME):
            some = slice(first, first + _PAGES_AT_A_TIME)
            logit_BKGPT = logits(query_BKGD, page_summary[:, :, some], page_format, scale)
            if live_BKGPT is not None:
                logit_BKGPT = logit_BKGPT.masked_fill(~live_BKGPT[..., some, :], -torch.inf)
            parts.append(logit_BKGPT.logsumexp(-1))
        return torch.cat(parts, -1)

    def logit_scale(self, scale):
        return 1.0


def row_bytes(head_dim, page_size, sketch_bits):
    plane, tiles = plane_bytes(head_dim, page_size), -(-page_size // TILE)
    first = plane + head_dim + 2 * TILE * tiles + 4
    return -(-first // LINE) * LINE + (sketch_bits - 1) * plane


def plane_bytes(head_dim, page_size):
    return -(-page_size // TILE) * -(-head_dim // BLOCK) * LINE


def signs(head_dim, device=None):
    """-1.0 or 1.0 per channel: the highest bit of a hash in 32 bits."""
    word = (torch.arange(head_dim, dtype=torch.int64, device=device) + 1) * 0x9E3779B1 % 2**32
    word = (word ^ (word >> 15)) * 0x85EBCA77 % 2**32
    return 1.0 - 2.0 * (word >> 31)


def rotate(x):
    """[..., D] -> [..., D]: signs, then sums and differences (Hadamard, not scaled) over blocks of
    n channels, n = rotation_size(D): dot products are n times what they were."""
    size, head_dim = rotation_size(x.shape[-1]), x.shape[-1]
    x = x * signs(head_dim, x.device).to(x.dtype)
    step = 1
    while step < size:
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        step *= 2
    return x


def rotation_size(head_dim):
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim


def page_rows(keys, sketch_bits):
    """keys [B, K, P, T, D] -> uint8 [B, K, P, bytes_per_page]."""
    keys = keys.float()
    is_finite = keys.isfinite().all(-1)
    keys = rotate(keys.where(is_finite[..., None], 0).clamp(-_MAX_KEY, _MAX_KEY))
    inverse = 1.0 / is_finite.sum(-1).clamp(min=1).float()
    mean = _sum_in_order(keys.unbind(-2)) * inverse[..., None]
    mean_scale = (mean.abs().amax(-1, keepdim=True) / 127.0).clamp(min=1e-30)
    mean_code = (mean / mean_scale).round().clamp(-127, 127)
    residual = keys - (mean_code * mean_scale)[..., None, :]
    square = _sum_channels(residual * residual)
    is_positive = residual >= 0
    planes = [is_positive]
    if sketch_bits == 1:
        token_scale = _root(square / residual.shape[-1])
    else:
        # Four even levels one deviation apart, which fits a normal distribution.
        deviation = _root(square / residual.shape[-1])
        is_outer = residual.abs() >= deviation[..., None]
        planes.append(is_outer == is_positive)
        level = torch.where(is_outer, 2.25, 0.25).sum(-1)  # exact
        token_scale = _root(square / level)
    # In this order: what the conversion makes of a NaN is not the same on every machine.
    token_scale = token_scale.bfloat16().masked_fill(~is_finite, torch.nan)
    planes = [pack(plane & is_finite[..., None]) for plane in planes]
    tiles = -(-token_scale.shape[-1] // TILE)
    token_scale = torch.nn.functional.pad(token_scale, (0, tiles * TILE - token_scale.shape[-1]))
    values = (mean_code.to(torch.int8), token_scale, mean_scale)
    first = torch.cat([planes[0], *(x.contiguous().view(torch.uint8) for x in values)], -1)
    first = torch.nn.functional.pad(first, (0, -first.shape[-1] % LINE))
    return torch.cat([first, *planes[1:]], -1)


def logits(query_BKGD, rows, page_format, scale):
    """[B, K, G, P, T]: estimates of scale * query.key; NaN for tokens that are not finite."""
    page_size, sketch_bits = page_format.page_size, page_format.sketch_bits
    head_dim, dtype = query_BKGD.shape[-1], query_BKGD.dtype
    code_BKGD, step_BKG1 = query_codes(query_BKGD)
    factor_BKG1 = step_BKG1 * (scale / rotation_size(head_dim))
    plane, tiles = plane_bytes(head_dim, page_size), -(-page_size // TILE)
    sizes = [plane, head_dim, 2 * TILE * tiles, 4]
    signs_plane, mean_code, token_scale, mean_scale, rest = rows.split(
        [*sizes, rows.shape[-1] - sum(sizes)], -1
    )
    level_BKPTD = unpack(signs_plane, head_dim, page_size).to(dtype) * 2
    if sketch_bits == 1:
        level_BKPTD = level_BKPTD - 1
    else:
        level_BKPTD = level_BKPTD + unpack(rest[..., -plane:], head_dim, page_size) - 1.5
    token_scale_BKPT = token_scale.contiguous().view(torch.bfloat16)[..., :page_size].to(dtype)
    mean_scale_BKP1 = mean_scale.contiguous().view(torch.float32).to(dtype)
    of_mean_BKGP = code_BKGD @ (mean_code.view(torch.int8).to(dtype) * mean_scale_BKP1).mT
    of_token_BKGPT = torch.stack(
        [
            torch.einsum("kgd,kptd->kgpt", code, level)
            for code, level in zip(code_BKGD, level_BKPTD, strict=True)
        ]
    )
    logit = of_token_BKGPT * token_scale_BKPT[:, :, None] + of_mean_BKGP[..., None]
    return logit * factor_BKG1[..., None]


def query_codes(query_BKGD):
    """The rotated query as whole numbers from -127 to 127, in its dtype, and what one is worth.

    A query with a NaN or infinity is NaN."""
    query_BKGD = query_BKGD.masked_fill(~query_BKGD.isfinite().all(-1, keepdim=True), torch.nan)
    rotated = rotate(query_BKGD)
    step = (rotated.abs().amax(-1, keepdim=True) / 127.0).clamp(min=1e-30)
    return (rotated / step).round(), step


def _sum_channels(x):
    """Over the last dimension: 8 sums side by side, then in pairs."""
    sums = _sum_in_order(x.unflatten(-1, (-1, 8)).unbind(-2))
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, -1)
        sums = low + high
    return sums[..., 0]


def pack(bits):
    """bool [..., T, D] -> a plane, uint8 [..., plane_bytes]."""
    num_tokens, head_dim = bits.shape[-2:]
    bits = torch.nn.functional.pad(bits, (0, -head_dim % BLOCK, 0, -num_tokens % TILE))
    bits = bits.unflatten(-1, (-1, 8, 4)).unflatten(-4, (-1, TILE))  # [..., I, 16, C, 8, 4]
    weight = 2 ** torch.arange(8, device=bits.device)
    return (bits.mT * weight).sum(-1).to(torch.uint8).transpose(-2, -3).flatten(-4)


def unpack(plane, head_dim, page_size):
    """The inverse: bits as uint8 [..., T, D]."""
    tiles = -(-page_size // TILE)
    plane = plane.unflatten(-1, (tiles, -1, TILE, 4)).transpose(-2, -3)  # [..., I, 16, C, 4]
    bits = (plane[..., None, :] >> torch.arange(8, device=plane.device)[:, None]) & 1
    return bits.flatten(-3).flatten(-3, -2)[..., :page_size, :head_dim]


def _root(x):
    """Rounded once, which sqrt in float32 is not on every machine."""
    return x.double().sqrt().float()


def _sum_in_order(values):
    total = 0.0
    for value in values:
        total = total + value
    return total
