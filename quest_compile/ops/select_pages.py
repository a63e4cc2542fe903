"""Select the pages to attend: sinks, recents and the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, limits, reference, registration, require
from quest_compile.ops.checked_call import checked_call
from quest_compile.ops.native import announce_reference

registration.define(
    "select_pages",
    "(Tensor scores, Tensor seq_lens, Tensor? attn_mask=None, *, int page_budget, "
    "int page_size=16, int num_sink_pages=1, int num_recent_pages=2, float budget_fraction=1.0, "
    "float top_p=1.0, float score_scale=1.0) -> Tensor",
)


def _check(
    scores,
    seq_lens,
    attn_mask,
    *,
    page_budget,
    page_size=16,
    num_sink_pages=1,
    num_recent_pages=2,
    budget_fraction=1.0,
    top_p=1.0,
    score_scale=1.0,
):
    require.tensors(scores=scores, seq_lens=seq_lens)
    checks.page_size(page_size)
    require.integer("page_budget", page_budget, 1)
    checks.page_budget("page_budget", page_budget, num_sink_pages, num_recent_pages)
    checks.share("budget_fraction", budget_fraction)
    checks.share("top_p", top_p)
    checks.finite("score_scale", score_scale)
    require.rank("scores", scores, 3, "[batch, num_select_heads, num_pages]")
    require.dtype("scores", scores, torch.float32)
    require.that(
        scores.shape[1] >= 1, lambda: f"scores: expected at least 1 head, got {scores.shape[1]}"
    )
    max_seq_len = scores.shape[2] * page_size
    if attn_mask is not None:
        checks.attn_mask(attn_mask, scores, (scores.shape[0], None, 1, None))
        max_seq_len = _check_mask_size(attn_mask, scores, page_size)
    checks.seq_lens(seq_lens, scores, max_seq_len)


def _check_mask_size(attn_mask, scores, page_size):
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
        return num_pages * page_size
    require.that(
        limits.num_pages_of(max_seq_len, page_size) == num_pages,
        lambda: (
            f"attn_mask: expected the positions of {num_pages} pages of {page_size}, "
            f"got {max_seq_len} positions"
        ),
    )
    return max_seq_len


@registration.reference("select_pages")
def _select_pages_reference(scores, seq_lens, attn_mask=None, **settings):
    _check(scores, seq_lens, attn_mask, **settings)
    announce_reference(scores)
    return reference.select_pages(scores, seq_lens, attn_mask, **settings)


@registration.fake("select_pages")
def _select_pages_fake(scores, seq_lens, attn_mask=None, *, page_budget, **settings):
    _check(scores, seq_lens, attn_mask, page_budget=page_budget, **settings)
    return scores.new_empty(*scores.shape[:2], page_budget, dtype=torch.int32)


_select_pages = torch.ops.quest.select_pages.default


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    attn_mask: Tensor | None = None,
    *,
    page_budget: int,
    page_size: int = 16,
    num_sink_pages: int = 1,
    num_recent_pages: int = 2,
    budget_fraction: float = 1.0,
    top_p: float = 1.0,
    score_scale: float = 1.0,
) -> Tensor:
    """The pages to attend: sinks, recents, then the highest scores; ties go to the lowest index.

    Args:
        scores: float32 [batch, num_select_heads, num_pages]; NaN counts as the highest.
        seq_lens: int32 or int64 [batch] or [1], valid positions, the current token included.
        attn_mask: bool (True = attend), broadcastable to [batch, num_q_heads, 1, max_seq_len].
            A page without a position to attend is never selected.
        page_budget: pages to select, at least num_sink_pages + num_recent_pages.
        page_size: positions per page.
        num_sink_pages: the first pages with a position to attend are selected.
        num_recent_pages: so are the last pages in use, the open page being the last of them.
        budget_fraction: above 0 and up to 1: a row selects at most this share of its pages in use,
            rounded up, but no less than the sinks, the recents and one more page.
        top_p: above 0 and below 1: of the pages that are not sinks or recents only the best, until
            those have this share of the softmax over the scores of all of them; page_budget caps
            what is selected. 1: page_budget alone decides.
        score_scale: what makes logits of scores, for top_p.

    Returns:
        int32 [batch, num_select_heads, page_budget], ascending, -1 in unused slots behind.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    settings = {
        "page_budget": page_budget,
        "page_size": page_size,
        "num_sink_pages": num_sink_pages,
        "num_recent_pages": num_recent_pages,
        "budget_fraction": budget_fraction,
        "top_p": top_p,
        "score_scale": score_scale,
    }
    return checked_call(_select_pages, _check, (scores, seq_lens, attn_mask), settings)
