"""Plant a bug in page selection, in the operators that every compiled step runs."""

import contextlib

import torch

from quest_compile.ops import SummaryFormat
from quest_compile.ops.summaries import SUMMARIES


def _reversed(rows):
    """Minimum and maximum change places, or all bytes of a sketch."""
    return rows.flip(3)


def _next_page(rows):
    """Every page has the summary of the one before it."""
    return rows.roll(1, 2)


def _stale(rows):
    """The second half of the cache was never summarised."""
    rows = rows.clone()
    rows[:, :, rows.shape[2] // 2 :] = 0
    return rows


def _other_head(rows):
    """Every KV head has the summaries of the first."""
    return rows[:, :1].expand_as(rows)


SUMMARY_BUGS = {
    "rows reversed": _reversed,
    "pages off by one": _next_page,
    "stale summaries": _stale,
    "summaries of another head": _other_head,
}
SILENTLY_DENSE = "silently dense"
BUGS = (*SUMMARY_BUGS, SILENTLY_DENSE)


@contextlib.contextmanager
def planted(bug):
    """The operators of the CPU with the bug in them."""
    library = torch.library.Library("quest", "IMPL")
    if bug == SILENTLY_DENSE:
        library.impl("sparse_decode", _dense, "CPU", allow_override=True)
    else:
        update = _update_with(SUMMARY_BUGS[bug])
        library.impl("update_page_summary", update, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _update_with(break_rows):
    def update(key_cache, cache_position, page_summary, num_sealed, **settings):
        page_format = SummaryFormat(**settings)
        num_pages = int(cache_position.max() + 1) // page_format.page_size
        keys = key_cache[:, :, : num_pages * page_format.page_size]
        keys = keys.unflatten(2, (num_pages, page_format.page_size))
        rows = SUMMARIES[page_format.summary].build(keys, page_format)
        page_summary[:, :, :num_pages] = break_rows(rows)
        num_sealed[0] = num_pages

    return update


def _dense(
    query,
    key_cache,
    value_cache,
    page_summary,
    seq_lens,
    attn_mask=None,
    *,
    scale=None,
    **selection,
):
    return torch.ops.quest.dense_decode(
        query, key_cache, value_cache, seq_lens, attn_mask, scale=scale
    )
