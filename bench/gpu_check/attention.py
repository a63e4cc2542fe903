"""Decode attention of one layer: our operators, stage by stage, and dense peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.attention_checks import error_of, expected_of, scores_of
from quest_compile.bench.gpu_check.each_workload import measure_each
from quest_compile.bench.gpu_check.inputs import SUMMARIES, Inputs, Workload
from quest_compile.bench.gpu_check.peers import Peer
from quest_compile.bench.gpu_check.record import Record, StepFailedError
from quest_compile.bench.gpu_check.timing import copy_bandwidth, median_seconds

Method = tuple[str, int, Callable[[Inputs], Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Operators of ours: whose kernels, and with which summaries."""

    kernels: str
    operators: Any
    summaries: tuple[str, ...]


def own_parts(device: str) -> tuple[list[Part], list[Part]]:
    """What is measured first, of all workloads, and what only then."""
    served = "cpu" if device == "cpu" else ops.provider_of("sparse_decode_step")
    operators: Any = ops
    later = []
    if served in ("native", "triton"):
        from quest_compile.ops.triton import operators as of_triton

        if served == "triton":
            operators = of_triton
        else:
            later = [Part("triton", of_triton, SUMMARIES[:1])]
    first = Part(served, operators, SUMMARIES[:1])
    return [first], [Part(served, operators, SUMMARIES[1:]), *later]


def methods_of(part: Part, workload: Workload) -> list[Method]:
    """(method, bytes that have to move, call), total and per stage."""
    f, page_budget = part.operators, workload.budget // 16

    def stage_select(x: Inputs) -> Any:
        return f.select_pages(x.scores, x.seq_lens, x.attn_mask, page_budget=page_budget)

    def stage_attend(x: Inputs) -> Any:
        caches = (x.query, x.key_cache, x.value_cache)
        return f.attend_pages(*caches, x.pages, x.seq_lens, x.attn_mask)

    def all_positions(x: Inputs) -> Any:
        caches = (x.query, x.key_cache, x.value_cache)
        return f.dense_decode(*caches, x.seq_lens, x.attn_mask)

    found: list[Method] = []
    for summary in part.summaries:
        found += _of_summary(summary, workload, f)
        if summary == "minmax":
            found += [
                ("dense_decode", workload.dense_bytes, all_positions),
                ("select_pages", 4 * _num_scores(workload), stage_select),
                ("attend_pages", workload.attend_bytes, stage_attend),
            ]
    return found


def _of_summary(summary: str, workload: Workload, f: Any) -> list[Method]:
    """Names end in the summary, unless that is the default."""
    kind = {} if summary == "minmax" else {"summary": summary}

    def step(x: Inputs) -> Any:
        state = x.states[summary]
        caches = (x.query, x.key_cache, x.value_cache, state.cache_position, state.rows)
        lens = (state.num_sealed, state.seq_lens, x.attn_mask, state.channel_scale)
        return f.sparse_decode_step(*caches, *lens, budget=workload.budget, **kind)

    def stage_update(x: Inputs) -> Any:
        state = x.states[summary]
        arguments = (state.cache_position, state.rows, state.num_sealed, state.channel_scale)
        return f.update_page_summary(x.key_cache, *arguments, **kind)

    def stage_score(x: Inputs) -> Any:
        return scores_of(f, x, summary)

    num_bytes, end = workload.score_bytes(summary), f", {summary}" if kind else ""
    return [
        (f"sparse_decode_step{end}", num_bytes + workload.attend_bytes, step),
        (f"update_page_summary{end}", workload.update_bytes(summary), stage_update),
        (f"score_pages{end}", num_bytes, stage_score),
    ]


def _num_scores(workload: Workload) -> int:
    return workload.batch * workload.layer.num_kv_heads * workload.context // 16


def run_attention(
    record: Record,
    device: str,
    workloads: list[Workload],
    peers_of: Callable[[Inputs], list[Peer]],
    has_own: bool = True,
) -> None:
    """Rows of all methods; a wrong result or an error is a row too; of ours, it fails the step.

    Peers and the default of ours come first, of all workloads: little time is enough for these.
    """
    bandwidth = copy_bandwidth(device)
    record.add(copy_GBps=bandwidth / 1e9)
    wrong: list[str] = []

    def time_methods(
        workload: Workload, copies: list[Inputs], kernels: str, methods: list[Method],
        expected: dict[str, torch.Tensor]
    ) -> None:  # fmt: skip
        for name, num_bytes, call in methods:
            row = {"workload": workload.name, "method": name, "kernels": kernels}
            why = error_of(name, call, copies[0], expected)
            if why:
                if kernels in ("native", "triton", "cpu"):
                    wrong.append(f"{workload.name} {name} [{kernels}]: {why}")
                record.add(**row, refused=why)
                continue
            seconds = median_seconds(call, copies)
            record.add(
                **row, us=1e6 * seconds, MiB=num_bytes / 2**20, GBps=num_bytes / seconds / 1e9,
                of_copy=num_bytes / seconds / bandwidth
            )  # fmt: skip

    def time_peers(workload: Workload, copies: list[Inputs]) -> None:
        expected = expected_of(copies[0], workload, ops, ())
        for name, kernels, call in peers_of(copies[0]):
            is_sparse = name.startswith("attend_pages")
            num_bytes = workload.attend_bytes if is_sparse else workload.dense_bytes
            time_methods(workload, copies, kernels, [(name, num_bytes, call)], expected)

    def time_parts(workload: Workload, copies: list[Inputs], parts: list[Part]) -> None:
        for part in parts:
            expected = expected_of(copies[0], workload, part.operators, part.summaries)
            methods = methods_of(part, workload)
            time_methods(workload, copies, part.kernels, methods, expected)

    first, later = own_parts(device) if has_own else ([], [])

    def measure_first(workload: Workload, copies: list[Inputs]) -> None:
        time_peers(workload, copies)
        time_parts(workload, copies, first)

    measure_each(record, device, workloads, measure_first, SUMMARIES[:1])
    if later:
        measure_each(record, device, workloads, lambda w, x: time_parts(w, x, later))
    if wrong:
        raise StepFailedError("; ".join(wrong)[:400])
