"""Hand the state of key caches to a compiled graph, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quest_compile.huge_pages import use_huge_pages
from quest_compile.state import PageSummaryState, record_own_write, state_of


def with_state(
    compiled: Callable[..., Any],
    cache_indices: list[tuple[int, int]],
    page_size: int,
    summary: str = "minmax",
    sketch_bits: int = 1,
    num_select_heads: Sequence[int] = (),
    select_every: int = 1,
    group_reduce: str = "sum",
) -> Callable[..., Any]:
    """Call ``compiled`` with the state of its key caches appended to its arguments.

    ``cache_indices``: which arguments are the key cache and the value cache of a layer.
    ``num_select_heads``: of the page scores that this graph keeps of each, 0 for none.
    """
    kind = (page_size, summary, sketch_bits, select_every, group_reduce)

    def step(*args: Any) -> Any:
        owners = [(args[i], state_of(args[i], *kind)) for i, _ in cache_indices]
        for (key_cache, state), (_, value_index) in zip(owners, cache_indices):
            if state.is_new:
                for tensor in (key_cache, args[value_index], state.page_summary):
                    use_huge_pages(tensor)
        states = [tensor for _, state in owners for tensor in state.tensors()]
        if num_select_heads:
            states = _with_scores(owners, num_select_heads, page_size)
        out = compiled(*args, *states)
        for key_cache, state in owners:
            record_own_write(key_cache, state)
        return out

    return step


def _with_scores(
    owners: list[tuple[torch.Tensor, PageSummaryState]],
    num_select_heads: Sequence[int],
    page_size: int,
) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for (key_cache, state), num_heads in zip(owners, num_select_heads, strict=True):
        tensors += state.tensors()
        if num_heads:
            tensors += state.score_tensors(key_cache, num_heads, page_size)
        else:
            state.forget_scores()
    return tensors
