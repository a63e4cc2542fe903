"""What a method of ``bench ops`` did: that the path of its name served, and rightly."""

from __future__ import annotations

from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.ops.checks import OWN_FACTOR, check_attention
from quest_compile.bench.ops.inputs import Step
from quest_compile.bench.ops.methods import SERVED, Method
from quest_compile.bench.results import RefusedError

# How others round is not ours to judge, only that they compute the same: one form of torch in
# float32 was seen at 7 times the error of another.
_OTHERS_FACTOR = 32


def check_method(method: Method, step: Step, served: Any = SERVED) -> dict[str, Any]:
    """Metadata that proves what ran on the first ``step``: counters, and the error against float64.

    Scores and selected pages were checked when the method was made.

    Raises:
        RefusedError: another path than the named one served, or its result is wrong.
    """
    if method.stage == "update":
        _check_update(method, step)
    if method.name == "read_loop" or method.stage not in ("", "attend"):
        return {}
    ops.reset_counters()
    out = method.call(step)
    out = out[0] if isinstance(out, tuple) else out
    counted = ops.counters()
    is_own = method.name.startswith(("quest", "dense_decode")) and not method.stage
    if served is SERVED and not method.stage:
        _check_path(method, step, counted)
    page_size = method.setting.page_size if method.setting else 16
    factor = OWN_FACTOR if is_own or method.stage else _OTHERS_FACTOR
    found: dict[str, Any] = check_attention(
        method.key, out, step.caches, step.key_cache.shape[2], method.pages, page_size, factor
    )
    if is_own:
        found |= {name: counted[name] for name in ("sparse_calls", "dense_calls")}
        found |= _reads(method, step, counted)
        method.bytes_moved = found["bytes_read"]
    return found


def _check_update(method: Method, step: Step) -> None:
    """Does it find that the last complete page has another row than its keys say?"""
    assert method.setting is not None
    page_format = method.setting.page_format
    rows = step.page_summary[page_format]
    page = step.key_cache.shape[2] // page_format.page_size - 1
    before = rows[:, :, page].clone()
    rows[:, :, page] = 0
    method.call(step)
    after = rows[:, :, page].clone()
    rows[:, :, page] = before
    if not torch.equal(after.view(torch.uint8), before.view(torch.uint8)):
        raise RefusedError(f"{method.key}: makes another row")


def _reads(method: Method, step: Step, counted: dict[str, int]) -> dict[str, int]:
    """As counted; where operators do not look at values, as the pages say."""
    if are_values_counted(step):
        found = {"bytes_read": counted["bytes_read"]}
        if counted["sparse_rows"]:
            found["tokens_per_query"] = counted["tokens_attended"] // counted["sparse_rows"]
        return found
    found = {"bytes_read": method.bytes_moved}
    if method.pages is not None and method.setting is not None:
        page_size, num_lists = method.setting.page_size, method.pages.shape[:2].numel()
        tokens = int((method.pages >= 0).sum()) // num_lists * page_size
        found["tokens_per_query"] = tokens - -step.key_cache.shape[2] % page_size
    return found


def are_values_counted(step: Step) -> bool:
    """Do the operators count what they read of this step, not calls alone?"""
    return step.key_cache.is_cpu


def _check_path(method: Method, step: Step, counted: dict[str, int]) -> None:
    expected = "none"
    if method.name == "dense_decode":
        expected = "dense_calls"
    elif method.setting is not None:
        is_sparse = method.setting.is_sparse(step.key_cache.shape[2])
        expected = "sparse_calls" if is_sparse else "sparse_calls_covered"
    for name in ("sparse_calls", "sparse_calls_covered", "dense_calls"):
        if counted[name] != (name == expected):
            raise RefusedError(f"{method.name}: expected {expected}, counted {counted}")
