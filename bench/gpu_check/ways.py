"""A sparse step with each way to select side by side, by the kernels that serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.each_workload import measure_each
from quest_compile.bench.gpu_check.errors import relative_error
from quest_compile.bench.gpu_check.inputs import Inputs, Workload
from quest_compile.bench.gpu_check.record import Record, StepFailedError
from quest_compile.bench.gpu_check.timing import median_seconds
from quest_compile.ops import reference, reference_selection

# Settings of a step.
_WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "top_p": {"top_p": 0.9},
    "budget_fraction": {"budget_fraction": 1 / 64},
}


def run_ways(record: Record, device: str, workloads: list[Workload]) -> None:
    """A row per way; one that attends other pages than select_pages chooses fails the step."""
    served = "cpu" if device == "cpu" else ops.provider_of("sparse_decode_step")
    wrong: list[str] = []

    def measure(workload: Workload, copies: list[Inputs]) -> None:
        wrong.extend(compare_ways(record, workload, copies, served))

    measure_each(record, device, workloads, measure)
    if wrong:
        raise StepFailedError("; ".join(wrong)[:400])


def compare_ways(
    record: Record, workload: Workload, copies: list[Inputs], served: str
) -> list[str]:
    """Which ways are wrong; only the others are timed."""
    wrong = []
    for way, settings in _WAYS.items():
        call = _step(workload, **settings)
        row: dict[str, Any] = {"workload": workload.name, "way": way, "kernels": served}
        pages = _pages_of(settings, workload, copies[0])
        if why := _why_wrong(call, copies[0], pages):
            wrong.append(f"{workload.name} {way}: {why}")
            record.add(**row, refused=why)
            continue
        num_pages = float((pages >= 0).sum(-1).float().mean())
        record.add(**row, pages=num_pages, us=1e6 * median_seconds(call, copies))
    return wrong


def _why_wrong(call: Callable[[Inputs], torch.Tensor], x: Inputs, pages: torch.Tensor) -> str:
    query, keys, values = (t[:1].float() for t in (x.query, x.key_cache, x.value_cache))
    right, _ = reference.attend_pages(query, keys, values, pages[:1], x.seq_lens)
    try:
        error = relative_error(call(x)[:1], right)
    except Exception as error_of_call:
        return f"{type(error_of_call).__name__}: {error_of_call}".splitlines()[0][:120]
    return "" if error < 0.02 else f"differs by {error:.3g} of the largest"


def _step(workload: Workload, **settings: Any) -> Callable[[Inputs], torch.Tensor]:
    def call(x: Inputs) -> torch.Tensor:
        state = x.states[settings.get("summary", "minmax")]
        caches = (x.query, x.key_cache, x.value_cache, state.cache_position, state.rows)
        lens = (state.num_sealed, state.seq_lens, x.attn_mask)
        return ops.sparse_decode_step(*caches, *lens, budget=workload.budget, **settings)

    return call


def _pages_of(settings: dict[str, Any], workload: Workload, x: Inputs) -> torch.Tensor:
    """What a call with these settings attends."""
    shares = dict(settings)
    summary = shares.pop("summary", "minmax")
    scores = ops.score_pages(x.query, x.states[summary].rows, x.seq_lens, summary=summary)
    if "top_p" in shares:
        group_size = x.query.shape[1] // x.key_cache.shape[1]
        shares["score_scale"] = reference_selection.score_scale_of(group_size, x.query.shape[3])
    page_budget = workload.budget // 16
    return ops.select_pages(scores, x.seq_lens, page_budget=page_budget, **shares)
