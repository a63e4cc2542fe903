"""Page scores in plain torch. Shape suffixes: those of reference.py."""

import torch

from quest_compile.ops import reference_sketch
from quest_compile.ops.reference_attention import dot_products, widen
from quest_compile.ops.reference_positions import arange, live_positions, seq_len_B11


def score_pages(
    query, page_summary, seq_lens, channel_scale=None, *, page_size=16, group_reduce="sum",
    summary="minmax", sketch_bits=1, attn_mask=None, scale=None
):  # fmt: skip
    """Upper bound of query.key over each complete page, for sketches the log of the sum of its exp
    over the page's live tokens; -inf for the others."""
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    head_dim = query.shape[-1]
    query_BKGD = widen(query.contiguous().view(batch, num_kv_heads, -1, head_dim))
    num_complete_B11 = seq_len_B11(seq_lens, num_pages * page_size) // page_size
    is_open_B1P = arange(num_pages, seq_lens) >= num_complete_B11
    if summary == "sketch":
        live_BKGPT = None
        if attn_mask is not None:
            live_BMT = live_positions(seq_lens, attn_mask, num_pages * page_size)
            num_groups = query.shape[1] if group_reduce == "none" else num_kv_heads
            if live_BMT.shape[1] > 1:
                live_BMT = live_BMT.unflatten(1, (num_groups, -1)).any(2)
                live_BMT = live_BMT.unflatten(1, (num_kv_heads, -1))
            else:
                live_BMT = live_BMT[:, None]
            live_BKGPT = live_BMT.unflatten(-1, (num_pages, page_size))
        score_BSP = reference_sketch.score_pages(
            query_BKGD, page_summary, channel_scale, live_BKGPT, page_size=page_size,
            sketch_bits=sketch_bits, group_reduce=group_reduce,
            scale=head_dim**-0.5 if scale is None else scale
        )  # fmt: skip
        return score_BSP.masked_fill(is_open_B1P, -torch.inf)
    # max(q*min, q*max) = min(q, 0)*min + max(q, 0)*max as min <= max: one dot product.
    weight_BKGW = torch.cat([query_BKGD.clamp(max=0), query_BKGD.clamp(min=0)], -1)
    if group_reduce == "sum":
        weight_BKGW = weight_BKGW.sum(2, keepdim=True)
    bound_BKGP = dot_products(weight_BKGW, page_summary.flatten(-2).to(weight_BKGW.dtype))
    score_BSP = bound_BKGP.amax(2) if group_reduce == "max" else bound_BKGP.flatten(1, 2)
    return score_BSP.masked_fill(is_open_B1P, -torch.inf)
