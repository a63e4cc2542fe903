"""Take out what protects the page summaries, to see that tests notice."""

import contextlib
import itertools

import pytest
import torch

from quest_compile import state, step_state
from quest_compile.ops import SummaryFormat
from quest_compile.ops.summaries import SUMMARIES


def update_that_trusts(what):
    """quest::update_page_summary without its own look at the keys, or at the position."""

    def update(key_cache, cache_position, page_summary, num_sealed, **settings):
        page_format = SummaryFormat(**settings)
        page_size, build = page_format.page_size, SUMMARIES[page_format.summary].build
        first = int(num_sealed[0])
        if what == "num_sealed":
            first = min(first, int(cache_position.min()) // page_size)
        last = (int(cache_position.max()) + 1) // page_size
        for page in range(first, last):
            keys = key_cache[:, :, page * page_size : (page + 1) * page_size]
            page_summary[:, :, page] = build(keys[:, :, None], page_format)[:, :, 0]
        num_sealed[0] = last if what == "num_sealed" else max(first, last)

    return update


@contextlib.contextmanager
def without_checks(*checks, num_layers):
    """Some of "version", "sampled pages", "position", "state per cache" taken out.

    Gives a function that forgets what caches share: without it runs depend on those before.
    """
    shared = {}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if "version" in checks:
            patch.setattr(state.PageSummaryState, "invalidate", lambda self: None)
        if "position" in checks:
            stack.enter_context(_update_replaced("nothing but num_sealed"))
        elif "sampled pages" in checks:
            stack.enter_context(_update_replaced("num_sealed"))
        if "state per cache" in checks:
            patch.setattr(step_state, "state_of", _state_of_nobody(num_layers, shared))
        yield shared.clear


@contextlib.contextmanager
def _update_replaced(what):
    library = torch.library.Library("quest", "IMPL")
    library.impl("update_page_summary", update_that_trusts(what), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _state_of_nobody(num_layers, shared):
    """The layers of a model are told apart, its caches are not."""
    turn = itertools.count()

    def state_of(key_cache, page_format):
        layer = next(turn) % num_layers
        made = state.PageSummaryState(key_cache, page_format)
        found = shared.setdefault((layer, page_format, tuple(key_cache.shape)), made)
        setattr(key_cache, state._ATTRIBUTE, {page_format: found})
        return found

    return state_of
