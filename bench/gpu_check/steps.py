"""The steps of gpu-check, the most important first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quest_compile.bench.gpu_check import checks, flashinfer_peer
from quest_compile.bench.gpu_check.attention import run_attention
from quest_compile.bench.gpu_check.end_to_end import Decoding, run_end_to_end
from quest_compile.bench.gpu_check.inputs import Workload
from quest_compile.bench.gpu_check.kernels import profile, run_kernels
from quest_compile.bench.gpu_check.peers import peers_of
from quest_compile.bench.gpu_check.record import Record, Step
from quest_compile.bench.gpu_check.ways import run_ways

_8B, _7B, _K = "llama-3-8b", "llama-2-7b", 1024
_MAIN = [Workload(_8B, 32 * _K, 1), Workload(_8B, 32 * _K, 8), Workload(_8B, 128 * _K, 1)]
_MAIN += [Workload(_7B, 32 * _K, 1), Workload(_8B, 8 * _K, 1)]
_MAIN += [Workload(_8B, 32 * _K, 16), Workload(_8B, 128 * _K, 4)]
_REST = [
    Workload(shape, context * _K, batch)
    for batch in (1, 8, 32)
    for shape in (_8B, _7B)
    for context in (4, 8, 32, 128)
]


def steps_of(device: str) -> list[Step]:
    """On a CPU everything is tiny: it shows that the steps work, and nothing else."""
    if device == "cpu":
        tiny = [Workload("tiny", 256, batch, 64, torch.float32) for batch in (1, 2)]
        decodings = [Decoding("tiny", 256, 2, 3, 64, torch.float32)]
        main, rest, whole, more = tiny[:1], tiny[1:], decodings, decodings
        kernels = tiny
        ways = [Workload("tiny", 256, batch, 192, torch.float32) for batch in (1, 2)]
    else:
        main, rest = _MAIN, [workload for workload in _REST if workload not in _MAIN]
        ways = _MAIN[:3]
        kernels = [workload for workload in _MAIN if workload.shape == _8B]
        whole = [Decoding(_8B, 32 * _K, 8)]
        more = [Decoding(_8B, 128 * _K, 1), Decoding(_8B, 8 * _K, 1)]

    def step(
        name: str, title: str, seconds: float, run: Callable[..., None], *args: object
    ) -> Step:
        def bound(record: Record) -> None:
            run(record, device, *args)

        return Step(name, title, seconds if device == "cuda" else 1, bound)

    return [
        step("environment", "Environment and copy bandwidth", 10, checks.environment),
        step("results", "Every operator against plain torch", 30, checks.results),
        step("tests", "GPU tests", 100, checks.tests),
        step("attention", "Attention, main shapes", 60, run_attention, main, peers_of),
        step("kernels", "Kernels of a call", 10, run_kernels, kernels),
        step("ways", "Ways to select", 10, run_ways, ways),
        step("end-to-end", "End to end, 8B shape", 120, run_end_to_end, whole),
        step("sanitizer", "compute-sanitizer", 40, checks.sanitizer),
        step("profile", "Nsight Compute", 20, profile),
        step("attention-more", "Attention, other shapes", 20, run_attention, rest, peers_of),
        step("end-to-end-more", "End to end, other contexts", 40, run_end_to_end, more),
        step("flashinfer", "FlashInfer", 20, checks.flashinfer),
    ]


def flashinfer_rows() -> Step:
    """What the step ``flashinfer`` runs in a process of its own."""

    def run(record: Record) -> None:
        run_attention(record, "cuda", _MAIN, flashinfer_peer.peers_of, has_own=False)

    return Step(checks.FLASHINFER_ROWS, "FlashInfer", 20, run)
