"""Which pages a row selects, in plain torch, and how many: a number, or a share of the pages in
use or of the softmax.

Shares are decided by arithmetic that every device does alike: a product of doubles, and weights
that are integers, so that their sums depend on no order. Shape suffixes: those of ops/reference.
"""

import math

import torch
from torch.nn.functional import pad

from quest_compile.ops.reference.positions import arange, live_positions, seq_len_B11

_LOG2_E = 1.4426950408889634
# 2^(29 + x) for x in (0, 1], by powers of x; together 2^30.
_COEFFICIENTS = (1 << 29, 372069241, 129584418, 27946717, 7270536)
_UNITS = 1 << 16


def select_pages(
    scores, seq_lens, attn_mask=None, *, page_budget, page_size=16, num_sink_pages=1,
    num_recent_pages=2, budget_fraction=1.0, top_p=1.0, score_scale=1.0
):  # fmt: skip
    """Sinks, recents and the highest scores: ascending indices of live pages, -1 behind them."""
    _, num_select_heads, num_pages = scores.shape
    live_BMT = live_positions(seq_lens, attn_mask, num_pages * page_size)
    live_BMP = live_BMT.unflatten(-1, (num_pages, page_size)).any(-1)
    num_groups = min(live_BMP.shape[1], num_select_heads)
    live_BSP = live_BMP.unflatten(1, (num_groups, -1)).any(2).expand_as(scores)
    num_used_B11 = (seq_len_B11(seq_lens, num_pages * page_size) + page_size - 1) // page_size
    is_sink_BSP = live_BSP.cumsum(-1) <= num_sink_pages
    is_recent_B1P = arange(num_pages, scores) >= num_used_B11 - num_recent_pages
    # Rank by kind (forced, live, dead), then by score, NaN being the highest, then by index.
    kind_BSP = live_BSP.int() + (live_BSP & (is_sink_BSP | is_recent_B1P)).int()
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_kind = kind_BSP.gather(-1, by_score).argsort(dim=-1, descending=True, stable=True)
    ranked = by_score.gather(-1, by_kind)
    row_budget_B11 = page_budget_of(
        num_used_B11, page_budget=page_budget, num_sink_pages=num_sink_pages,
        num_recent_pages=num_recent_pages, budget_fraction=budget_fraction
    )  # fmt: skip
    kind_BSP = kind_BSP.gather(-1, ranked)
    is_kept_BSP = (kind_BSP > 0) & (arange(num_pages, scores) < row_budget_B11)
    if top_p < 1:
        scores = scores.gather(-1, ranked)
        is_kept_BSP &= (kind_BSP == 2) | is_in_top_p(scores, kind_BSP == 1, top_p, score_scale)
    chosen = ranked.masked_fill(~is_kept_BSP, num_pages)[..., :page_budget].sort(-1).values
    chosen = pad(chosen, (0, page_budget - chosen.shape[-1]), value=num_pages)
    return chosen.masked_fill(chosen == num_pages, -1).int()


def page_budget_of(
    num_pages, *, page_budget, num_sink_pages=1, num_recent_pages=2, budget_fraction=1.0, **_
):
    """Pages that a row with ``num_pages`` in use (int, or int64 tensor) selects at most."""
    smallest = num_sink_pages + num_recent_pages + 1
    if isinstance(num_pages, int):
        return min(page_budget, max(smallest, math.ceil(budget_fraction * num_pages)))
    share = (num_pages.double() * budget_fraction).ceil().long()
    return share.clamp(min=smallest).clamp(max=page_budget)


def is_in_top_p(score_BSP, is_candidate_BSP, top_p, score_scale):
    """Of pages in descending order of score: has it less than top_p of all weight before it?

    The weight of a candidate is 2^30 * exp(score_scale * (score - best)), a whole number, and of
    scores that are shares (score_scale None) 2^24 * score, at most 2^30; NaN has 2^30.
    """
    if score_scale is None:
        weight_BSP = (score_BSP * 2.0**24).nan_to_num(nan=2.0**30).clamp(0, 2.0**30).long()
        return _is_in_share(weight_BSP.where(is_candidate_BSP, 0), top_p)
    is_ranked_BSP = is_candidate_BSP & ~score_BSP.isnan()
    best_BS1 = score_BSP.where(is_ranked_BSP, -torch.inf).amax(-1, keepdim=True)
    distance_BSP = (best_BS1 - score_BSP) * (score_scale * _LOG2_E)
    is_best_BSP = (score_BSP == best_BS1) | score_BSP.isnan()
    weight_BSP = _weight_of(distance_BSP.where(~is_best_BSP, 0)).where(is_candidate_BSP, 0)
    return _is_in_share(weight_BSP, top_p)


def _is_in_share(weight_BSP, top_p):
    before_BSP = weight_BSP.cumsum(-1) - weight_BSP
    total_BS1 = weight_BSP.sum(-1, keepdim=True)
    return before_BSP.double() < total_BS1.double() * top_p


def _weight_of(distance):
    """2^30 * 2^-distance, in integers but for the rounding of distance down to units of 2^-16."""
    units = (distance.where(distance > 0, 0).clamp(max=31) * _UNITS).long()
    rest = _UNITS - units % _UNITS
    power = torch.zeros_like(units)
    for coefficient in reversed(_COEFFICIENTS):
        power = coefficient + (power * rest // _UNITS)
    return power >> (units // _UNITS)
