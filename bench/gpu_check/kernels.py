"""Where the time of a call goes: its kernels inside a CUDA graph, the host, Nsight Compute's words.

``python -m quest_compile.bench.gpu_check.kernels``: what Nsight Compute profiles.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from quest_compile.bench.gpu_check.each_workload import measure_each
from quest_compile.bench.gpu_check.record import Record, StepSkippedError
from quest_compile.bench.gpu_check.run_logged import cuda_tool, run_logged
from quest_compile.bench.gpu_check.timing import median_seconds
from quest_compile.bench.ops.inputs import Step, Workload, make_steps
from quest_compile.bench.ops.methods import dense_decode, sparse_decode
from quest_compile.bench.settings import Setting

Call = Callable[[Step], torch.Tensor]
_REPLAYS, _HOST_CALLS = 3, 200
_SECTIONS = (
    "SpeedOfLight", "WarpStateStats", "SourceCounters", "LaunchStats", "InstructionStats"
)  # fmt: skip
# Of the report of a kernel: the column of our table, and the name of the line.
_FIGURES = {
    "us": "Duration",
    "dram_percent": "DRAM Throughput",
    "instructions": "Executed Instructions",
    "registers": "Registers Per Thread",
}


def calls_of(workload: Workload, setting: Setting) -> dict[str, Call]:
    return {
        setting.name: sparse_decode(setting, workload.context),
        "dense_decode": dense_decode,
    }


def run_kernels(
    record: Record, device: str, workloads: list[Workload], settings: list[Setting]
) -> None:
    """Per call: its time in a graph and on the host, and a row for each of its kernels."""

    def measure(workload: Workload, copies: list[Step]) -> None:
        for name, call in calls_of(workload, settings[0]).items():
            row: dict[str, Any] = {"workload": workload.name, "method": name}
            us = 1e6 * median_seconds(call, copies)
            record.add(**row, us=us, host_us=1e6 * _host_seconds(call, copies[0]))
            for kernel, (times, share) in kernel_times(call, copies, device).items():
                record.add(**row, kernel=kernel, per_call=share, us=statistics.median(times))

    measure_each(record, device, workloads, settings[:1], measure)


def _host_seconds(call: Call, x: Step) -> float:
    """Of a call outside of a graph, until it comes back."""
    call(x)
    if x.query.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_HOST_CALLS):
        call(x)
    return (time.perf_counter() - start) / _HOST_CALLS


def kernel_times(
    call: Call, copies: list[Step], device: str
) -> dict[str, tuple[list[float], float]]:
    """By kernel: microseconds of each of its runs, and how many there are in a call."""
    if device != "cuda":
        return {}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [call(x) for x in copies]
    graph.replay()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[short_name(event.name)].append(event.time_range.elapsed_us())
    del outs, graph
    num_calls = _REPLAYS * len(copies)
    return {name: (found, len(found) / num_calls) for name, found in times.items()}


def short_name(kernel: str) -> str:
    """Without namespaces, templates and parameters."""
    found = re.search(r"(\w+)(?=[<(]|$)", kernel.removeprefix("void "))
    return found[1] if found else kernel[:24]


def profile(record: Record, device: str) -> None:
    """Nsight Compute on a step and on dense attention; its whole report is beside the results."""
    tool = cuda_tool("ncu")
    if device != "cuda" or tool is None:
        raise StepSkippedError("no GPU" if device != "cuda" else "ncu is not installed")
    report = record.folder / "kernels.ncu-rep"
    sections = [part for name in _SECTIONS for part in ("--section", name)]
    command = [tool, *sections, "--clock-control", "none", "--profile-from-start", "off", "-f"]
    command += ["-o", str(report.with_suffix("")), sys.executable, "-m", __name__]
    limit = min(60.0, record.seconds_left() - 5)
    done = run_logged(command, limit, record.folder / "ncu.log")
    if not report.is_file():
        raise StepSkippedError(f"ncu ended with {done.returncode} and wrote nothing; see ncu.log")
    command = [tool, "--import", str(report), "--page", "details"]
    text = run_logged(command, 20, record.folder / "ncu-details.txt").output
    for row in figures_in(text):
        record.add(**row)


def figures_in(details: str) -> list[dict[str, Any]]:
    """A row per kernel of the text that ncu prints."""
    rows = []
    for part in re.split(r"(?m)^  (?=\S.*\), Context \d+)", details)[1:]:
        row: dict[str, Any] = {"kernel": short_name(part.split("(", 1)[0])}
        for column, line in _FIGURES.items():
            found = re.search(rf"(?m)^    {line} +(\S+ +)?([\d.,]+)$", part)
            if found:
                unit, number = (found[1] or "").strip(), float(found[2].replace(",", ""))
                row[column] = number * (1e3 if unit == "ms" else 1)
        rows.append(row)
    return rows


def main() -> None:
    cudart = torch.cuda.cudart()
    for batch in (1, 8):
        workload = Workload.of_shape("llama-3-8b", 32 * 1024, batch)
        x = make_steps(workload, [Setting()])[0]
        for call in calls_of(workload, Setting()).values():
            call(x)
            torch.cuda.synchronize()
            cudart.cudaProfilerStart()
            call(x)
            torch.cuda.synchronize()
            cudart.cudaProfilerStop()


if __name__ == "__main__":
    main()
