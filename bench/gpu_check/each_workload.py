"""One workload after the other, as time and memory allow."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quest_compile.bench.gpu_check.record import Record
from quest_compile.bench.ops.inputs import Step, Workload, make_steps
from quest_compile.bench.settings import Setting


def measure_each(
    record: Record, device: str, workloads: list[Workload], settings: list[Setting],
    measure: Callable[[Workload, list[Step]], None]
) -> None:  # fmt: skip
    """Call ``measure`` with the tensors of each; a row says what was skipped and why.

    ``measure`` must keep nothing of them: their memory is what the next workload needs.
    """
    for workload in workloads:
        if record.seconds_left() < 10:
            record.add(workload=workload.name, skipped=f"{record.seconds_left():.0f} s left")
            continue
        budget = settings[0].selection(workload.context).budget
        touched = workload.dense_bytes * min(budget, workload.context) // workload.context
        try:
            steps = make_steps(workload, settings, touched)
        except (MemoryError, torch.OutOfMemoryError) as error:
            record.add(workload=workload.name, skipped=f"memory: {error}"[:80])
            continue
        measure(workload, steps)
        del steps
        if device == "cuda":
            torch.cuda.empty_cache()
