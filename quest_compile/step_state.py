"""Hand the state of key caches to a compiled graph, step by step."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from quest_compile.huge_pages import use_huge_pages
from quest_compile.ops import SummaryFormat
from quest_compile.state import record_own_write, state_of


class SparseSteps:
    """How many there have been."""

    def __init__(self) -> None:
        self.count = 0


_sparse_steps: contextvars.ContextVar[SparseSteps | None] = contextvars.ContextVar(
    "quest_sparse_steps", default=None
)


@contextlib.contextmanager
def counted_sparse_steps() -> Iterator[SparseSteps]:
    """Count the calls of graphs with sparse attention inside, of this thread, CUDA graphs too."""
    steps = SparseSteps()
    token = _sparse_steps.set(steps)
    try:
        yield steps
    finally:
        _sparse_steps.reset(token)


def with_state(
    compiled: Callable[..., Any],
    cache_indices: list[tuple[int, int]],
    page_format: SummaryFormat,
    is_sparse: bool = False,
) -> Callable[..., Any]:
    """Call ``compiled`` with the state of its key caches appended to its arguments.

    ``cache_indices``: which arguments are the key cache and the value cache of a layer.
    ``is_sparse``: it is a sparse step.
    """

    def step(*args: Any) -> Any:
        if is_sparse and (steps := _sparse_steps.get()) is not None:
            steps.count += 1
        owners = [(args[i], state_of(args[i], page_format)) for i, _ in cache_indices]
        for (key_cache, state), (_, value_index) in zip(owners, cache_indices):
            if state.before_write is not None:
                state.before_write()
            if state.is_new:
                for tensor in (key_cache, args[value_index], state.page_summary):
                    use_huge_pages(tensor)
        states = [tensor for _, state in owners for tensor in state.tensors()]
        out = compiled(*args, *states)
        for key_cache, state in owners:
            record_own_write(key_cache, state)
        return out

    return step
