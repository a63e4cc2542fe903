"""Select the pages to attend: sinks, recents and the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from quest_compile.ops import checks, reference, require
from quest_compile.ops.operator import operator
from quest_compile.ops.settings import ChoiceSettings, Selection, SummaryFormat, check_room


def _check(
    scores,
    seq_lens,
    attn_mask=None,
    *,
    page_budget,
    score_scale=1.0,
    page_size=16,
    **settings,
):
    require.tensors(scores=scores, seq_lens=seq_lens)
    pages = SummaryFormat(page_size=page_size)
    require.integer("page_budget", page_budget, 1)
    check_room("page_budget", page_budget, Selection(budget=page_budget * page_size, **settings))
    if score_scale is not None:
        checks.finite("score_scale", score_scale)
    require.rank("scores", scores, 3, "[batch, num_select_heads, num_pages]")
    require.dtype("scores", scores, torch.float32)
    require.that(
        scores.shape[1] >= 1, lambda: f"scores: expected at least 1 head, got {scores.shape[1]}"
    )
    max_seq_len = scores.shape[2] * page_size
    if attn_mask is not None:
        checks.attn_mask(attn_mask, scores, (scores.shape[0], None, 1, None))
        max_seq_len = _check_mask_size(attn_mask, scores, pages)
    checks.seq_lens(seq_lens, scores, max_seq_len)


def _check_mask_size(attn_mask, scores, pages):
    """The mask's heads and positions have to fit the scores'. Returns the number of positions."""
    num_select_heads, num_pages = scores.shape[1:]
    num_heads, max_seq_len = attn_mask.shape[1], attn_mask.shape[3]
    if num_heads != 1:
        require.that(
            num_heads % num_select_heads == 0,
            lambda: (
                f"attn_mask: expected 1 head or a multiple of the {num_select_heads} heads of "
                f"scores, got {num_heads}"
            ),
        )
    if max_seq_len == 1:
        return num_pages * pages.page_size
    require.that(
        pages.num_pages(max_seq_len) == num_pages,
        lambda: (
            f"attn_mask: expected the positions of {num_pages} pages of {pages.page_size}, "
            f"got {max_seq_len} positions"
        ),
    )
    return max_seq_len


def _fake(scores, seq_lens, attn_mask, *, page_budget, **settings):
    return scores.new_empty(*scores.shape[:2], page_budget, dtype=torch.int32)


_OPERATOR = operator(
    "select_pages",
    "(Tensor scores, Tensor seq_lens, Tensor? attn_mask=None, *, int page_budget, "
    f"{Selection.schema(*ChoiceSettings.__annotations__)}, "
    "float? score_scale=1.0, int page_size=16) -> Tensor",
    check=_check,
    reference=reference.select_pages,
    fake=_fake,
)


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    *,
    page_budget: int,
    score_scale: float | None = 1.0,
    page_size: int = 16,
    **settings: Unpack[ChoiceSettings],
) -> Tensor:
    """The pages to attend: sinks, recents, then the highest scores; ties go to the lowest index.

    Args:
        scores: float32 [batch, num_select_heads, num_pages]; NaN counts as the highest.
        seq_lens: int32 or int64 [batch] or [1], valid positions, the current token included.
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, 1, max_seq_len].
            A page without a position to attend is never selected.
        page_budget: pages to select, at least the sinks and recents.
        score_scale: what makes logits of scores, where a share of their softmax decides; None:
            scores are shares, as those of group_reduce="softmax".
        page_size: positions per page.
        settings: the sinks, the recents and the shares of Selection.

    Returns:
        int32 [batch, num_select_heads, page_budget], ascending, -1 in unused slots behind.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    settings_of_scores = {"score_scale": score_scale, "page_size": page_size}
    tensors = (scores, seq_lens, attn_mask)
    return _OPERATOR(*tensors, page_budget=page_budget, **settings_of_scores, **settings)
