"""Page scores in plain torch. Shape suffixes: those of ops/reference."""

import torch

from quest_compile.ops.products import widen
from quest_compile.ops.reference.positions import arange, live_positions, seq_len_B11
from quest_compile.ops.settings import Selection, SummaryFormat
from quest_compile.ops.summaries import SUMMARIES
from quest_compile.ops.summaries.minmax import score_sum


def score_pages(
    query,
    page_summary,
    seq_lens,
    attn_mask=None,
    *,
    group_reduce=Selection.group_reduce,
    scale=None,
    **settings,
):
    """Score of each complete page for the heads that select, -inf for the others: a bound of
    query.key, for sketches the log of the sum of its exp over the page's live tokens; with
    group_reduce="softmax" the sum of the heads' shares."""
    page_format = SummaryFormat(**settings)
    summary, page_size = SUMMARIES[page_format.summary], page_format.page_size
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query_BKGD = widen(query.contiguous().view(batch, num_kv_heads, -1, query.shape[-1]))
    num_complete_B11 = seq_len_B11(seq_lens, num_pages * page_size) // page_size
    is_open_B1P = arange(num_pages, seq_lens) >= num_complete_B11
    if group_reduce == "sum":
        return score_sum(query_BKGD, page_summary).masked_fill(is_open_B1P, -torch.inf)
    live_BKGPT = None
    if attn_mask is not None:
        live_BMT = live_positions(seq_lens, attn_mask, num_pages * page_size)
        num_groups = num_kv_heads if live_BMT.shape[1] > 1 else 1
        live_BKGPT = live_BMT.unflatten(1, (num_groups, -1)).unflatten(-1, (num_pages, page_size))
    score_BKGP = summary.score(query_BKGD, page_summary, live_BKGPT, page_format, scale)
    score_BKGP = score_BKGP.masked_fill(is_open_B1P[:, None], -torch.inf)
    if group_reduce == "none":
        return score_BKGP.flatten(1, 2)
    # Not by multiplication: a scale may be zero or negative.
    logit_BKGP = score_BKGP * summary.logit_scale(scale)
    return shares(logit_BKGP.masked_fill(score_BKGP == -torch.inf, -torch.inf))


def shares(logit_BKGP):
    """[B, K, P]: each head's softmax over the pages, summed over the heads of a group.

    NaN for a page that has it for one of the heads, which leave it out of their sums; -inf for a
    page that has -inf for all.
    """
    is_nan_BKGP = logit_BKGP.isnan()
    counts_BKGP = ~is_nan_BKGP & (logit_BKGP > -torch.inf)
    best_BKG1 = logit_BKGP.masked_fill(is_nan_BKGP, -torch.inf).amax(-1, keepdim=True)
    distance_BKGP = (logit_BKGP - best_BKG1).masked_fill(logit_BKGP == best_BKG1, 0)
    weight_BKGP = distance_BKGP.exp().masked_fill(~counts_BKGP, 0)
    share_BKGP = weight_BKGP / weight_BKGP.sum(-1, keepdim=True).clamp(min=1)
    counts_BKP = (counts_BKGP | is_nan_BKGP).any(2)
    share_BKP = sum(share_BKGP.unbind(2)).masked_fill(is_nan_BKGP.any(2), torch.nan)
    return share_BKP.masked_fill(~counts_BKP, -torch.inf)


def score_scale_of(group_size, head_dim, *, group_reduce, summary, scale=None):
    """What makes logits of page scores; None: they are shares. Those of "sum" are of the mean
    query of the group."""
    if group_reduce == "softmax":
        return None
    scale = head_dim**-0.5 if scale is None else scale
    logit_scale = SUMMARIES[summary].logit_scale(scale)
    return logit_scale / group_size if group_reduce == "sum" else logit_scale
