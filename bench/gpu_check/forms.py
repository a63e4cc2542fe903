"""The two forms of a native sparse step side by side: two kernels, or one by clusters of CTAs."""

from __future__ import annotations

from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.each_workload import measure_each
from quest_compile.bench.gpu_check.inputs import Inputs, Workload
from quest_compile.bench.gpu_check.record import Record, StepFailedError, StepSkippedError
from quest_compile.bench.gpu_check.timing import median_seconds
from quest_compile.ops import native


def run_forms(record: Record, device: str, workloads: list[Workload]) -> None:
    """A row per form, and which form is taken unasked; other bits fail the step."""
    if device != "cuda" or ops.provider_of("sparse_decode_step") != "native":
        raise StepSkippedError("no native CUDA kernels serve here")
    wrong: list[str] = []

    def measure(workload: Workload, copies: list[Inputs]) -> None:
        if not compare_forms(record, workload, copies):
            wrong.append(workload.name)

    measure_each(record, device, workloads, measure)
    if wrong:
        raise StepFailedError(f"the forms have other bits: {', '.join(wrong)}")


def compare_forms(record: Record, workload: Workload, copies: list[Inputs]) -> bool:
    """Whether both forms have the same bits."""

    def step(x: Inputs) -> torch.Tensor:
        caches = (x.query, x.key_cache, x.value_cache)
        state = x.states["minmax"]
        rows = (state.cache_position, state.rows, state.num_sealed)
        return ops.sparse_decode_step(
            *caches, *rows, state.seq_lens, x.attn_mask, budget=workload.budget
        )

    def form_of_a_step() -> str:
        before = ops.counters()["cluster_calls"]
        outs.append(step(copies[0]))
        return "cluster" if ops.counters()["cluster_calls"] > before else "two_kernels"

    outs: list[torch.Tensor] = []
    with native.decode_form("auto"):
        unasked = form_of_a_step()
    for form in ("two_kernels", "cluster"):
        row: dict[str, Any] = {"workload": workload.name, "form": form, "unasked": form == unasked}
        with native.decode_form(form):
            if form_of_a_step() != form:
                record.add(**row, refused="no clusters here")
                continue
            record.add(**row, us=1e6 * median_seconds(step, copies))
    return all(torch.equal(outs[0], out) for out in outs)
