"""Kinds of page summaries: what is kept of the keys of a page, and how it is scored.

One file is one kind, in plain torch; kernels answer to it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quest_compile.ops.settings import SummaryFormat
from quest_compile.ops.summaries.minmax import MinMax
from quest_compile.ops.summaries.row import Row
from quest_compile.ops.summaries.sketch import Sketch


class Summary(Protocol):
    """Shape suffixes: those of ops/reference.

    scores_tokens: a score is made of single tokens, by the mask and as a logit; else it bounds
        those of the page. A page with NaN in any key scores NaN; finite keys have finite scores
        up to where bounds overflow.
    """

    scores_tokens: bool

    def row(self, head_dim: int, dtype: torch.dtype, page_format: SummaryFormat) -> Row:
        """What one page has; ``dtype``: of the keys."""

    def build(self, keys: Tensor, page_format: SummaryFormat) -> Tensor:
        """keys [B, K, P, page_size, D] -> [B, K, P, row]: a function of the keys of each page
        alone, bit for bit."""

    def score(
        self,
        query_BKGD: Tensor,
        page_summary: Tensor,
        live_BKGPT: Tensor | None,
        page_format: SummaryFormat,
        scale: float,
    ) -> Tensor:
        """[B, K, G, P] of each query head; logits are ``logit_scale(scale)`` times that.

        ``live_BKGPT``: bool, may be broadcast; None: all tokens count.
        """

    def logit_scale(self, scale: float) -> float: ...


SUMMARIES: dict[str, Summary] = {"minmax": MinMax(), "sketch": Sketch()}
