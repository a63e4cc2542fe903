"""Decode attention of one layer: our operators, stage by stage, and dense peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.inputs import (
    SCALED_SUMMARIES,
    Inputs,
    Workload,
    make_inputs,
)
from quest_compile.bench.gpu_check.peers import Peer
from quest_compile.bench.gpu_check.record import Record, StepFailedError
from quest_compile.bench.gpu_check.timing import copy_bandwidth, median_seconds
from quest_compile.ops import reference

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
    budget, page_budget = workload.budget, workload.budget // 16
    score, attend = workload.score_bytes, workload.attend_bytes
    dense = workload.dense_bytes
    found: list[Any] = []
    for kernels, f in sources:

        def step(x: Inputs, f: Any = f) -> Any:
            caches = (x.query, x.key_cache, x.value_cache)
            state = (x.cache_position, x.page_summary, x.num_sealed)
            return f.sparse_decode_step(*caches, *state, x.seq_lens, x.attn_mask, budget=budget)

        def stage_score(x: Inputs, f: Any = f) -> Any:
            return f.score_pages(x.query, x.page_summary, x.seq_lens)

        def stage_select(x: Inputs, f: Any = f) -> Any:
            return f.select_pages(x.scores, x.seq_lens, x.attn_mask, page_budget=page_budget)

        def stage_attend(x: Inputs, f: Any = f) -> Any:
            caches = (x.query, x.key_cache, x.value_cache)
            return f.attend_pages(*caches, x.pages, x.seq_lens, x.attn_mask)

        def all_positions(x: Inputs, f: Any = f) -> Any:
            caches = (x.query, x.key_cache, x.value_cache)
            return f.dense_decode(*caches, x.seq_lens, x.attn_mask)

        found += [
            ("sparse_decode_step", kernels, score + attend, step),
            ("dense_decode", kernels, dense, all_positions),
            ("score_pages", kernels, score, stage_score),
            ("select_pages", kernels, 4 * _num_scores(workload), stage_select),
            ("attend_pages", kernels, attend, stage_attend),
        ]
        for summary in SCALED_SUMMARIES:
            found += _of_summary(summary, workload, kernels, f)
    return found


def _of_summary(summary: str, workload: Workload, kernels: str, f: Any) -> list[Method]:
    num_bytes = workload.summary_bytes(summary)

    def step(x: Inputs) -> Any:
        rows, channel_scale = x.scaled[summary]
        caches = (x.query, x.key_cache, x.value_cache, x.cache_position, rows, x.num_sealed)
        lens = (x.seq_lens, x.attn_mask, channel_scale)
        return f.sparse_decode_step(*caches, *lens, budget=workload.budget, summary=summary)

    moved = num_bytes + workload.attend_bytes
    return [
        (f"sparse_decode_step, {summary}", kernels, moved, step),
        (f"score_pages, {summary}", kernels, num_bytes, lambda x: _scores(f, x, summary)),
    ]


def _scores(f: Any, x: Inputs, summary: str) -> Any:
    rows, channel_scale = x.scaled[summary]
    return f.score_pages(x.query, rows, x.seq_lens, channel_scale, summary=summary)


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
    wrong = []
    for workload in workloads:
        if record.seconds_left() < 10:
            record.add(workload=workload.name, skipped=f"{record.seconds_left():.0f} s left")
            continue
        try:
            copies = make_inputs(workload, device, workload.score_bytes + workload.attend_bytes)
        except (MemoryError, torch.OutOfMemoryError) as error:
            record.add(workload=workload.name, skipped=f"memory: {error}"[:80])
            continue
        methods = own_methods(workload, device) if has_own else []
        for name, kernels, call in peers_of(copies[0]):
            is_sparse = name.startswith("attend_pages")
            num_bytes = workload.attend_bytes if is_sparse else workload.dense_bytes
            methods.append((name, kernels, num_bytes, call))
        expected = _expected(copies[0], workload)
        for name, kernels, num_bytes, call in methods:
            why = _error_of(name, call, copies[0], expected)
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
        del copies, expected
        if device == "cuda":
            torch.cuda.empty_cache()
    if wrong:
        raise StepFailedError("; ".join(wrong)[:400])


def _expected(x: Inputs, workload: Workload) -> dict[str, torch.Tensor]:
    """Of the first row, in float32: dense and over the selected pages."""
    row = slice(0, 1)
    query, keys, values = (t[row].float() for t in (x.query, x.key_cache, x.value_cache))
    dense = reference.dense_decode(query, keys, values, x.seq_lens)
    sparse = dense
    if workload.context > workload.budget:
        sparse, _ = reference.attend_pages(query, keys, values, x.pages[row], x.seq_lens)
    expected = {"dense": dense, "sparse": sparse, "scores": x.scores, "pages": x.pages}
    for summary, (rows, channel_scale) in x.scaled.items():
        chosen = dense
        arguments = (x.query[row], rows[row], x.seq_lens, channel_scale[row])
        expected[f"{summary} scores"] = reference.score_pages(*arguments, summary=summary)
        if workload.context > workload.budget:
            # Scores near each other may change places: the pages are those of the kernel.
            own = _scores(ops, x, summary)
            pages = ops.select_pages(own, x.seq_lens, page_budget=workload.budget // 16)
            chosen, _ = reference.attend_pages(query, keys, values, pages[row], x.seq_lens)
        expected[summary] = chosen
    return expected


def _error_of(
    name: str, call: Callable[[Inputs], Any], x: Inputs, expected: dict[str, torch.Tensor]
) -> str:
    """Why this method is not timed; empty if it is right."""
    kinds = {"sparse_decode_step": "sparse", "attend_pages": "sparse", "score_pages": "scores",
             "select_pages": "pages"}  # fmt: skip
    for summary in SCALED_SUMMARIES:
        kinds |= {f"sparse_decode_step, {summary}": summary}
        kinds |= {f"score_pages, {summary}": f"{summary} scores"}
    wanted = expected[kinds.get(name) or kinds.get(name.split(",")[0], "dense")]
    try:
        out = call(x)
        out = out[0] if isinstance(out, tuple) else out
        if name == "select_pages":
            return "" if torch.equal(out, wanted) else "other pages"
        out = out.reshape(out.shape[0], *wanted.shape[1:])[: wanted.shape[0]].float()
        finite = wanted.isfinite()
        difference = (out[finite] - wanted.float()[finite]).abs().max()
        size = wanted.float()[finite].abs().max()
        is_right = bool(difference <= 0.02 * size) and torch.equal(out.isfinite(), finite)
        return "" if is_right else f"differs by {float(difference / size):.3g} of the largest"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
