"""Decode attention of one layer: our operators, stage by stage, and dense peers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from quest_compile import ops
from quest_compile.bench.gpu_check.each_workload import measure_each
from quest_compile.bench.gpu_check.record import Record, StepFailedError
from quest_compile.bench.gpu_check.timing import copy_bandwidth, median_seconds
from quest_compile.bench.ops.inputs import Step, Workload
from quest_compile.bench.ops.methods import SERVED, Method, dense_decode, quest_methods
from quest_compile.bench.ops.prove import check_method
from quest_compile.bench.settings import Setting

Peers = Callable[[Workload, list[Step]], list[Method]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Operators of ours: whose kernels, and with which settings."""

    kernels: str
    served: Any
    settings: tuple[Setting, ...]
    has_dense: bool = True


def own_parts(device: str, settings: Sequence[Setting]) -> tuple[list[Part], list[Part]]:
    """What is measured first, of all workloads, and what only then."""
    served = "cpu" if device == "cpu" else ops.provider_of("sparse_decode_step")
    default, others = tuple(settings[:1]), tuple(settings[1:])
    later = [Part(served, SERVED, others, has_dense=False)] if others else []
    if served == "native":
        from quest_compile.ops.triton import operators

        later.append(Part("triton", operators, default))
    return [Part(served, SERVED, default)], later


def run_attention(
    record: Record, device: str, workloads: list[Workload], settings: list[Setting],
    peers_of: Peers, has_own: bool = True
) -> None:  # fmt: skip
    """Rows of all methods; a wrong result or an error is a row too; of ours, it fails the step.

    Peers and the default of ours come first, of all workloads: little time is enough for these.
    """
    bandwidth = copy_bandwidth(device)
    record.add(copy_GBps=bandwidth / 1e9)
    wrong: list[str] = []

    def time_method(row: dict[str, Any], method: Method, steps: list[Step], served: Any) -> str:
        row = row | {"method": method.key}
        _, why = attempt(check_method, method, steps[0], served)
        if why:
            record.add(**row, refused=why)
            return f"{method.key}: {why}"
        seconds, num_bytes = median_seconds(method.call, steps), method.bytes_moved
        record.add(
            **row, us=1e6 * seconds, MiB=num_bytes / 2**20, GBps=num_bytes / seconds / 1e9,
            of_copy=num_bytes / seconds / bandwidth
        )  # fmt: skip
        return ""

    def time_part(workload: Workload, steps: list[Step], part: Part) -> None:
        row = {"workload": workload.name, "kernels": part.kernels}
        dense = functools.partial(dense_decode, served=part.served)
        methods = [Method("dense_decode", dense, workload.dense_bytes)] if part.has_dense else []
        found = []
        for setting in part.settings:
            made, why = attempt(quest_methods, setting, steps, workload, part.served)
            methods += made or []
            if why:
                record.add(**row, method=setting.name, refused=why)
                found.append(f"{setting.name}: {why}")
        found += [time_method(row, method, steps, part.served) for method in methods]
        if part.kernels != "torch":
            wrong.extend(f"{workload.name} [{part.kernels}] {why}" for why in found if why)

    first, later = own_parts(device, settings) if has_own else ([], [])

    def measure_first(workload: Workload, steps: list[Step]) -> None:
        for peer in peers_of(workload, steps):
            time_method({"workload": workload.name, "kernels": "peer"}, peer, steps, SERVED)
        for part in first:
            time_part(workload, steps, part)

    def measure_later(workload: Workload, steps: list[Step]) -> None:
        for part in later:
            time_part(workload, steps, part)

    measure_each(record, device, workloads, settings[:1], measure_first)
    if later:
        measure_each(record, device, workloads, settings, measure_later)
    if wrong:
        raise StepFailedError("; ".join(wrong)[:400])


def attempt(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The result, or why there is none."""
    try:
        return call(*arguments), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:120]
