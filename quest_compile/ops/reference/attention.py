"""Attention over a cache in plain torch: listed pages, or all positions.

Shape suffixes: those of ops/reference.
"""

import torch

from quest_compile.ops.products import dot_products, widen
from quest_compile.ops.reference.positions import (
    arange,
    each_query,
    join_queries,
    live_positions,
)

TILE_SIZE = 512


def attend_pages(
    query, key_cache, value_cache, page_indices, seq_lens, attn_mask=None, *, page_size=16,
    scale=None
):  # fmt: skip
    """Attention over the live positions of the listed pages: out, log of the softmax's sum."""
    batch, max_seq_len = query.shape[0], key_cache.shape[2]
    live_BMT = live_positions(seq_lens, attn_mask, max_seq_len)
    num_heads = max(page_indices.shape[1], live_BMT.shape[1])
    page_BHP = page_indices.long().repeat_interleave(num_heads // page_indices.shape[1], 1)
    position_BHN = (page_BHP[..., None] * page_size + arange(page_size, page_BHP)).flatten(-2)
    in_cache_BHN = position_BHN.clamp(0, max_seq_len - 1)
    live_BHN = live_BMT.expand(batch, num_heads, -1).gather(-1, in_cache_BHN)
    live_BHN &= in_cache_BHN == position_BHN
    row = arange(batch, query)[:, None, None]
    kv_head = (arange(num_heads, query) * key_cache.shape[1] // num_heads)[:, None]
    key_BHND, value_BHNE = (cache[row, kv_head, in_cache_BHN] for cache in (key_cache, value_cache))
    out_BHGE, lse_BHG = _attend(query, key_BHND, value_BHNE, live_BHN, scale)
    return join_queries([out_BHGE.flatten(1, 2)[:, :, None].to(query.dtype)]), lse_BHG.flatten(
        1, 2
    )[..., None]


def dense_decode(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    """Attention over all live positions."""
    outs = [
        attend_all(query, key_cache, value_cache, seq_lens, attn_mask, scale=scale)
        for query, seq_lens, attn_mask in each_query(query, seq_lens, attn_mask)
    ]
    return join_queries(outs)


def dense_prefill(query, key_cache, value_cache, cache_position, attn_mask=None, *, scale=None):
    """Attention of each query over the live positions up to its own."""
    outs = []
    for i in range(query.shape[2]):
        mask = None if attn_mask is None else attn_mask[:, :, min(i, attn_mask.shape[2] - 1), None]
        query_i, seq_lens = query[:, :, i : i + 1], cache_position[i : i + 1] + 1
        outs.append(attend_all(query_i, key_cache, value_cache, seq_lens, mask, scale=scale))
    return join_queries(outs)


def attend_all(query, key_cache, value_cache, seq_lens, attn_mask, *, scale):
    """A tile at a time; a tile without any live position changes no bit."""
    num_kv_heads, max_seq_len = key_cache.shape[1:3]
    live_BMT = live_positions(seq_lens, attn_mask, max_seq_len)
    num_heads = max(num_kv_heads, live_BMT.shape[1])
    out, lse = query.new_zeros(()), query.new_full((), -torch.inf, dtype=torch.float32)
    for first in range(0, int(seq_lens.max()) if seq_lens.is_cpu else max_seq_len, TILE_SIZE):
        live_BHT = live_BMT[..., first : first + TILE_SIZE].expand(-1, num_heads, -1)
        key_BHTD, value_BHTE = (
            cache[:, :, first : first + TILE_SIZE].repeat_interleave(num_heads // num_kv_heads, 1)
            for cache in (key_cache, value_cache)
        )
        part, part_lse = _attend(query, key_BHTD, value_BHTE, live_BHT, scale)
        old_lse, lse = lse, torch.logaddexp(lse, part_lse)
        out = out * exp(old_lse, lse)[..., None] + part * exp(part_lse, lse)[..., None]
    return out.flatten(1, 2)[:, :, None].to(query.dtype)


def full_attention(query, key_cache, value_cache, seq_lens, attn_mask=None, *, scale=None):
    """Of one query: out [B, Q, E] in float32, and the probability of every position [B, Q, T]."""
    num_kv_heads, max_seq_len = key_cache.shape[1:3]
    live_BMT = live_positions(seq_lens, attn_mask, max_seq_len)
    num_heads = max(num_kv_heads, live_BMT.shape[1])
    live_BHT = live_BMT.expand(len(query), num_heads, -1)
    key_BHTD, value_BHTE = (
        cache.repeat_interleave(num_heads // num_kv_heads, 1).where(live_BHT[..., None], 0)
        for cache in (key_cache, value_cache)
    )
    logit_BHGT = _logits(query, key_BHTD, live_BHT, scale)
    weight_BHGT = exp(logit_BHGT, logit_BHGT.logsumexp(-1, keepdim=True))
    return (weight_BHGT @ widen(value_BHTE)).flatten(1, 2), weight_BHGT.flatten(1, 2)


def _attend(query, key_BHND, value_BHNE, live_BHN, scale):
    """Softmax attention: out [B, H, G, E], lse [B, H, G]; 0 and -inf where nothing is live."""
    key_BHND, value_BHNE = widen(key_BHND), widen(value_BHNE)
    if not (live_BHN.is_cpu and live_BHN.all()):
        # Dead entries are zeroed as well as masked: 0 * NaN is NaN.
        key_BHND, value_BHNE = (x.where(live_BHN[..., None], 0) for x in (key_BHND, value_BHNE))
    logit_BHGN = _logits(query, key_BHND, live_BHN, scale)
    lse_BHG = logit_BHGN.logsumexp(-1)
    weight_BHGN = exp(logit_BHGN, lse_BHG[..., None])
    return torch.stack([w @ v for w, v in zip(weight_BHGN, value_BHNE, strict=True)]), lse_BHG


def _logits(query, key_BHND, live_BHN, scale):
    """[B, H, G, N]; -inf where not live."""
    query_BHGD = widen(query.contiguous().view(*key_BHND.shape[:2], -1, query.shape[-1]))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logit_BHGN = dot_products(query_BHGD, widen(key_BHND)) * scale
    return logit_BHGN.masked_fill(~live_BHN[:, :, None], -torch.inf)


def exp(x, total):
    """exp(x - total), 0 where total is -inf."""
    return (x - total.clamp(min=torch.finfo(x.dtype).min)).exp()
