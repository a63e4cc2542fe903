"""Hand the state of key caches to a compiled graph, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quest_compile.huge_pages import use_huge_pages
from quest_compile.ops import SummaryFormat
from quest_compile.state import record_own_write, state_of


def with_state(
    compiled: Callable[..., Any],
    cache_indices: list[tuple[int, int]],
    page_format: SummaryFormat,
) -> Callable[..., Any]:
    """Call ``compiled`` with the state of its key caches appended to its arguments.

    ``cache_indices``: which arguments are the key cache and the value cache of a layer.
    """

    def step(*args: Any) -> Any:
        owners = [(args[i], state_of(args[i], page_format)) for i, _ in cache_indices]
        for (key_cache, state), (_, value_index) in zip(owners, cache_indices):
            if state.is_new:
                for tensor in (key_cache, args[value_index], state.page_summary):
                    use_huge_pages(tensor)
        states = [tensor for _, state in owners for tensor in state.tensors()]
        out = compiled(*args, *states)
        for key_cache, state in owners:
            record_own_write(key_cache, state)
        return out

    return step
