"""One workload after the other, as time and memory allow."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quest_compile.bench.gpu_check.inputs import SUMMARIES, Inputs, Workload, make_inputs
from quest_compile.bench.gpu_check.record import Record


def measure_each(
    record: Record,
    device: str,
    workloads: list[Workload],
    measure: Callable[[Workload, list[Inputs]], None],
    summaries: tuple[str, ...] = SUMMARIES,
) -> None:
    """Call ``measure`` with the inputs of each; a row says what was skipped and why.

    ``measure`` must keep nothing of its inputs: their memory is what the next workload needs.
    """
    for workload in workloads:
        if record.seconds_left() < 10:
            record.add(workload=workload.name, skipped=f"{record.seconds_left():.0f} s left")
            continue
        try:
            touched = workload.score_bytes() + workload.attend_bytes
            copies = make_inputs(workload, device, touched, summaries)
        except (MemoryError, torch.OutOfMemoryError) as error:
            record.add(workload=workload.name, skipped=f"memory: {error}"[:80])
            continue
        measure(workload, copies)
        del copies
        if device == "cuda":
            torch.cuda.empty_cache()
