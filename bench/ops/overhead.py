"""What a call costs before it reads anything: dispatch and checks, at the smallest sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.ops.inputs import Workload, make_steps
from quest_compile.bench.ops.measure import sample_fields
from quest_compile.bench.ops.methods import SERVED, dense_decode, sdpa_group_as_q_len
from quest_compile.bench.results import Result
from quest_compile.bench.rounds import Rounds, measure_rounds
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import Layer

# Two pages of the smallest size do not fit the smallest budget: all three stages run.
_CONTEXT, _SETTING = 32, Setting(budget=24, page_size=8)
_CALLS = 300

METHOD = "overhead"
WORKLOADS = tuple(
    f"overhead/{call}"
    for call in (
        "sparse_decode",
        "sparse_decode_operator",
        "dense_decode",
        "update_page_summary",
        "sdpa_group_as_q_len",
        "torch_add",
    )
)


def measure_overhead(rounds: Rounds) -> list[Result]:
    """Seconds per call; the values are means over a few hundred calls in a row."""
    workload = Workload("overhead", Layer(1, 1, 8), _CONTEXT, torch.float32)
    step = make_steps(workload, [_SETTING])[0]
    page_format = _SETTING.page_format
    page_summary, num_sealed = step.page_summary[page_format], step.num_sealed[page_format]
    tensors = (*step.caches, page_summary, step.seq_lens)
    written = (step.key_cache, step.cache_position, page_summary, num_sealed)
    calls: list[Callable[[], Any]] = [
        lambda: ops.sparse_decode(*tensors, budget=24, page_size=8),
        lambda: SERVED.sparse_decode(*tensors, budget=24, page_size=8),
        lambda: dense_decode(step),
        lambda: ops.update_page_summary(*written, page_size=8),
        lambda: sdpa_group_as_q_len(step),
        lambda: step.query + step.query,
    ]
    samplers = {name: _sampler(call) for name, call in zip(WORKLOADS, calls, strict=True)}
    samples = measure_rounds(samplers, rounds, "overhead of a call")
    facts = sample_fields(samples) | {"kernels": ops.native_status().info}
    return [
        Result(name, METHOD, values, facts | {"calls_per_value": _CALLS})
        for name, values in samples.values.items()
    ]


def _sampler(call: Callable[[], Any]) -> Callable[[int], float]:
    def sample(number: int) -> float:
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        return (time.perf_counter() - start) / _CALLS

    return sample
