"""Page summaries live with the key cache they describe: same lifetime, same identity.

The state hangs on the cache tensor as an attribute: it is freed with the cache, needs no table of
caches, and costs 0.15 us to find. A copy of a cache (deepcopy, pickle) starts without one.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable

import torch

from quest_compile import ops

log = logging.getLogger(__name__)

_ANNOUNCED_AFTER = 32
_is_announced = False
_ATTRIBUTE = "_quest_page_summaries"
_BEFORE_WRITE = "_quest_before_write"


class PageSummaryState:
    """What is known about one key cache.

    ``page_summary``: as update_page_summary takes it.
    ``num_sealed`` int64 [2], on the cache's device: leading pages whose summary is up to date, and
    for caches without a version counter the position at which the next write has to begin.
    ``version``: the cache's version counter after our last call; None for inference tensors,
    which have none (there only what the device itself can see is left).
    ``is_new``: no step has ended with this state.
    ``before_write``: see :func:`call_before_writes`.
    """

    __slots__ = (
        "address",
        "before_write",
        "foreign_writes",
        "has_version",
        "is_new",
        "num_sealed",
        "page_summary",
        "version",
    )

    def __init__(self, key_cache: torch.Tensor, page_format: ops.SummaryFormat) -> None:
        # Outside inference mode, so that the state may be written in either mode later.
        with torch.inference_mode(False), torch.no_grad():
            self.page_summary = ops.empty_page_summary(key_cache, **page_format.as_kwargs())
            next_position = 0 if key_cache.is_inference() else -1
            self.num_sealed = torch.tensor([0, next_position], device=key_cache.device)
        self.has_version = not key_cache.is_inference()
        self.version: int | None = None
        self.foreign_writes = 0
        self.is_new = True
        self.address = key_cache.data_ptr()
        self.before_write: Callable[[], None] | None = getattr(key_cache, _BEFORE_WRITE, None)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a graph takes, in the order of ``SummaryInputs``."""
        return self.page_summary, self.num_sealed

    def invalidate(self) -> None:
        """Forget everything: the next update rebuilds all page summaries from the keys."""
        self.num_sealed[0] = 0


class _StatesOfCache(dict):
    """Format of the pages -> state. Copies of the tensor, saved too, get none."""

    def __deepcopy__(self, memo: dict) -> dict:
        return {}

    def __reduce__(self) -> tuple:
        return (OrderedDict, ())


def state_of(key_cache: torch.Tensor, page_format: ops.SummaryFormat) -> PageSummaryState:
    """The state of this cache, made on first sight, invalidated if somebody else wrote the cache.

    Called before each step. Two checks together find foreign writes: the version counter here, and
    on the device the comparison of sampled summaries with the keys (``update_page_summary``).
    Inference tensors have no version counter: there every write that does not follow ours rebuilds
    the summaries, and what other code changes without moving the position is found by the samples,
    so that the change of a few pages may be missed for some steps.
    """
    states = key_cache.__dict__.get(_ATTRIBUTE)
    if type(states) is not _StatesOfCache:
        states = _StatesOfCache()
        setattr(key_cache, _ATTRIBUTE, states)
    state = states.get(page_format)
    if state is None or state.address != key_cache.data_ptr():
        if state is None and states and hasattr(key_cache, _BEFORE_WRITE):
            _note_other_format(next(iter(states)), page_format)
        state = states[page_format] = PageSummaryState(key_cache, page_format)
    elif state.has_version and state.version != key_cache._version:
        state.invalidate()
        _note_foreign_write(state)
    elif state.foreign_writes:
        state.foreign_writes = 0
    return state


def _note_foreign_write(state: PageSummaryState) -> None:
    """Say once when every step has to rebuild, which costs as much as reading all keys."""
    global _is_announced
    state.foreign_writes += 1
    if state.foreign_writes == _ANNOUNCED_AFTER and not _is_announced:
        _is_announced = True
        log.warning(
            "other code wrote a key cache before each of the last %d steps: its page summaries are "
            "rebuilt every time, which is right but slow (another backend or page size on the same "
            "cache?)",
            _ANNOUNCED_AFTER,
        )


@functools.cache
def _note_other_format(saved: ops.SummaryFormat, page_format: ops.SummaryFormat) -> None:
    """Once in a process; of a large file all keys are a long read."""
    log.warning(
        "a cache in a file has page summaries of %s, and %s is wanted: made from all keys now "
        "(give OffloadedStaticCache the settings of the backend)",
        saved,
        page_format,
    )


def record_own_write(key_cache: torch.Tensor, state: PageSummaryState) -> None:
    """Called after each step: what the cache's version is once our graph has written it."""
    state.is_new = False
    if state.has_version:
        state.version = key_cache._version


def call_before_writes(key_cache: torch.Tensor, function: Callable[[], None]) -> None:
    """Have ``function`` called before every compiled step that writes this cache."""
    setattr(key_cache, _BEFORE_WRITE, function)


def rows_to_restore(
    key_cache: torch.Tensor, page_format: ops.SummaryFormat, num_pages: int
) -> torch.Tensor:
    """Where the caller has to put the summaries of the first pages, which it has kept since the
    keys were written: [batch, num_kv_heads, num_pages, ...]."""
    state = state_of(key_cache, page_format)
    state.num_sealed[0] = num_pages
    state.version = key_cache._version
    return state.page_summary[:, :, :num_pages]


def current_rows(
    key_cache: torch.Tensor, page_format: ops.SummaryFormat, length: int
) -> torch.Tensor:
    """The summaries of the complete pages of ``length`` positions, made where they are not."""
    state = state_of(key_cache, page_format)
    last = torch.tensor([length - 1], device=key_cache.device)
    ops.update_page_summary(key_cache, last, *state.tensors(), **page_format.as_kwargs())
    state.version = key_cache._version
    return state.page_summary[:, :, : length // page_format.page_size]
