"""The steps of gpu-check, the most important first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quest_compile.bench.gpu_check import checks, flashinfer_peer
from quest_compile.bench.gpu_check.attention import run_attention
from quest_compile.bench.gpu_check.end_to_end import Decoding, run_end_to_end
from quest_compile.bench.gpu_check.kernels import profile, run_kernels
from quest_compile.bench.gpu_check.peers import peers_of
from quest_compile.bench.gpu_check.record import Record, Step
from quest_compile.bench.ops.inputs import Workload
from quest_compile.bench.settings import MORE, QUEST, Setting

_8B, _7B, _K = "llama-3-8b", "llama-2-7b", 1024
_MAIN = [
    Workload.of_shape(shape, context * _K, batch)
    for shape, context, batch in (
        (_8B, 32, 1), (_8B, 32, 8), (_8B, 128, 1), (_7B, 32, 1), (_8B, 8, 1), (_8B, 32, 16),
        (_8B, 128, 4)
    )
]  # fmt: skip
_REST = [
    Workload.of_shape(shape, context * _K, batch)
    for batch in (1, 8, 32)
    for shape in (_8B, _7B)
    for context in (4, 8, 32, 128)
]


def settings_of(budget: int, share: float) -> list[Setting]:
    """The default first."""
    return [Setting(kind, budget) for kind in QUEST | MORE] + [Setting(budget=share)]


def steps_of(device: str) -> list[Step]:
    """On a CPU everything is tiny: it shows that the steps work, and nothing else."""
    if device == "cpu":
        tiny = [Workload.of_shape("tiny", 256, batch, "cpu", torch.float32) for batch in (1, 2)]
        decodings = [Decoding("tiny", 256, 2, 3, 64, torch.float32)]
        main, rest, whole, more = tiny[:1], tiny[1:], decodings, decodings
        kernels, settings = tiny, settings_of(64, 0.5)
    else:
        main, rest = _MAIN, [workload for workload in _REST if workload not in _MAIN]
        kernels = [workload for workload in _MAIN if workload.shape == _8B]
        settings = settings_of(2048, 1 / 64)
        whole = [Decoding(_8B, 32 * _K, 8)]
        more = [Decoding(_8B, 128 * _K, 1), Decoding(_8B, 8 * _K, 1)]
    default = settings[:1]

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
        step("attention", "Attention, main shapes", 70, run_attention, main, settings, peers_of),
        step("kernels", "Kernels of a call", 10, run_kernels, kernels, default),
        step("end-to-end", "End to end, 8B shape", 120, run_end_to_end, whole),
        step("sanitizer", "compute-sanitizer", 40, checks.sanitizer),
        step("profile", "Nsight Compute", 20, profile),
        step(
            "attention-more", "Attention, other shapes", 20, run_attention, rest, default, peers_of
        ),
        step("end-to-end-more", "End to end, other contexts", 40, run_end_to_end, more),
        step("flashinfer", "FlashInfer", 20, checks.flashinfer),
    ]


def flashinfer_rows() -> Step:
    """What the step ``flashinfer`` runs in a process of its own."""

    def run(record: Record) -> None:
        peers_of = flashinfer_peer.peers_of
        run_attention(record, "cuda", _MAIN, [Setting()], peers_of, has_own=False)

    return Step(checks.FLASHINFER_ROWS, "FlashInfer", 20, run)
