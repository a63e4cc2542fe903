"""Minimum and maximum of the keys of a page: the paper's summary, and a bound on query.key.

sum_d max(q_d * min_d, q_d * max_d) is never below the product with any key of the page.
"""

from __future__ import annotations

import torch

from quest_compile.ops.products import dot_products
from quest_compile.ops.summaries.row import Row


class MinMax:
    scores_tokens = False

    def row(self, head_dim, dtype, page_format):
        return Row((2, head_dim), dtype, "2, head_dim")

    def build(self, keys, page_format):
        """Adding 0 leaves one zero: -0.0 becomes 0.0."""
        return torch.stack([keys.amin(3), keys.amax(3)], 3) + 0.0

    def score(self, query_BKGD, page_summary, live_BKGPT, page_format, scale):
        return _live_pages(_bounds(_weights(query_BKGD), page_summary), live_BKGPT)

    def logit_scale(self, scale):
        return scale


def score_sum(query_BKGD, page_summary):
    """[B, K, P]: bound of the summed queries of each group, one product a page."""
    return _bounds(_weights(query_BKGD).sum(2, keepdim=True), page_summary)[:, :, 0]


def _weights(query_BKGD):
    """max(q*min, q*max) = min(q, 0)*min + max(q, 0)*max as min <= max: one dot product."""
    return torch.cat([query_BKGD.clamp(max=0), query_BKGD.clamp(min=0)], -1)


def _bounds(weight_BKGW, page_summary):
    return dot_products(weight_BKGW, page_summary.flatten(-2).to(weight_BKGW.dtype))


def _live_pages(score_BKGP, live_BKGPT):
    if live_BKGPT is None:
        return score_BKGP
    return score_BKGP.masked_fill(~live_BKGPT.any(-1), -torch.inf)
