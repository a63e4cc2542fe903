"""Decode attention of one layer: our operators, stage by stage, and dense peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quest_compile import ops
from quest_compile.bench.gpu_check.attention_checks import error_of, expected_of, scores_of
from quest_compile.bench.gpu_check.each_workload import measure_each
from quest_compile.bench.gpu_check.inputs import SUMMARIES, Inputs, Workload
from quest_compile.bench.gpu_check.peers import Peer
from quest_compile.bench.gpu_check.record import Record, StepFailedError
from quest_compile.bench.gpu_check.timing import copy_bandwidth, median_seconds

Method = tuple[str, str, int, Callable[[Inputs], Any]]


def own_methods(workload: Workload, device: str) -> list[Method]:
    """(method, kernels, bytes that have to move, call), total and per stage."""
    sources: list[tuple[str, Any]] = []
    served = "cpu" if device == "cpu" else ops.provider_of("sparse_decode_step")
    if served != "triton":
        sources.append((served, ops))
    if device == "cuda" and served != "torch":
        from quest_compile.ops.triton import operators

        sources.append(("triton", operators))
    page_budget = workload.budget // 16
    found: list[Method] = []
    for kernels, f in sources:

        def stage_select(x: Inputs, f: Any = f) -> Any:
            return f.select_pages(x.scores, x.seq_lens, x.attn_mask, page_budget=page_budget)

        def stage_attend(x: Inputs, f: Any = f) -> Any:
            caches = (x.query, x.key_cache, x.value_cache)
            return f.attend_pages(*caches, x.pages, x.seq_lens, x.attn_mask)

        def all_positions(x: Inputs, f: Any = f) -> Any:
            caches = (x.query, x.key_cache, x.value_cache)
            return f.dense_decode(*caches, x.seq_lens, x.attn_mask)

        found += _of_summary(SUMMARIES[0], workload, kernels, f)
        found += [
            ("dense_decode", kernels, workload.dense_bytes, all_positions),
            ("select_pages", kernels, 4 * _num_scores(workload), stage_select),
            ("attend_pages", kernels, workload.attend_bytes, stage_attend),
        ]
        for summary in SUMMARIES[1:]:
            found += _of_summary(summary, workload, kernels, f)
    return found


def _of_summary(summary: str, workload: Workload, kernels: str, f: Any) -> list[Method]:
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
        (f"sparse_decode_step{end}", kernels, num_bytes + workload.attend_bytes, step),
        (f"update_page_summary{end}", kernels, workload.update_bytes(summary), stage_update),
        (f"score_pages{end}", kernels, num_bytes, stage_score),
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
    """Rows of all methods; a wrong result or an error is a row too; of ours, it fails the step."""
    bandwidth = copy_bandwidth(device, 2**30 if device == "cuda" else 2**22)
    record.add(copy_GBps=bandwidth / 1e9)
    wrong: list[str] = []

    def measure(workload: Workload, copies: list[Inputs]) -> None:
        methods = own_methods(workload, device) if has_own else []
        for name, kernels, call in peers_of(copies[0]):
            is_sparse = name.startswith("attend_pages")
            num_bytes = workload.attend_bytes if is_sparse else workload.dense_bytes
            methods.append((name, kernels, num_bytes, call))
        expected = expected_of(copies[0], workload)
        for name, kernels, num_bytes, call in methods:
            why = error_of(name, call, copies[0], expected)
            if why:
                if kernels in ("native", "triton", "cpu"):
                    wrong.append(f"{workload.name} {name} [{kernels}]: {why}")
                record.add(workload=workload.name, method=name, kernels=kernels, refused=why)
                continue
            seconds = median_seconds(call, copies)
            record.add(
                workload=workload.name, method=name, kernels=kernels, us=1e6 * seconds,
                MiB=num_bytes / 2**20, GBps=num_bytes / seconds / 1e9,
                of_copy=num_bytes / seconds / bandwidth
            )  # fmt: skip

    measure_each(record, device, workloads, measure)
    if wrong:
        raise StepFailedError("; ".join(wrong)[:400])
