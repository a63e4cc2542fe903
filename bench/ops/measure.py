"""Measure one workload: check every method, then time all in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile.bench.ops.checks import check_kernels
from quest_compile.bench.ops.inputs import CacheFlush, Step, Workload, make_steps
from quest_compile.bench.ops.methods import Method, methods_of
from quest_compile.bench.ops.prove import check_method
from quest_compile.bench.results import Result
from quest_compile.bench.rounds import Rounds, Sampler, Samples, measure_rounds
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import dtype_name


def prepare(
    workload: Workload, settings: list[Setting], wanted: list[str] | None
) -> tuple[list[Method], dict[str, Sampler], dict[str, dict[str, Any]]]:
    """Methods that passed their checks, their samplers and their metadata, by key.

    Raises:
        RefusedError: see ``checks``.
    """
    torch.set_num_threads(workload.threads)
    kernels = check_kernels(workload.device)
    steps = make_steps(workload, settings)
    methods = methods_of(workload, steps, settings, wanted)
    facts = {m.key: check_method(m, steps[0]) | kernels for m in methods}
    flush = CacheFlush(workload.device)
    samplers = {m.key: _sampler(m.call, steps, flush) for m in methods}
    return methods, samplers, facts


def _sampler(call: Callable[[Step], Any], steps: list[Step], flush: CacheFlush) -> Sampler:
    def sample(number: int) -> float:
        step = steps[number % len(steps)]
        flush()
        # Other keys and values, the same code: Python and torch cost 0.1 ms or more when theirs has
        # left the caches of the CPU, which is not what is compared here.
        call(steps[(number + 1) % len(steps)])
        start = time.perf_counter()
        call(step)
        if step.query.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return sample


def measure(
    workload: Workload,
    settings: list[Setting],
    wanted: list[str] | None,
    rounds: Rounds,
    add_peers: Callable[[Workload], dict[str, tuple[Sampler, dict[str, Any]]]] | None = None,
) -> tuple[list[Result], Samples]:
    """Results of all methods; ``add_peers`` brings samplers and metadata of other systems."""
    methods, samplers, facts = prepare(workload, settings, wanted)
    peers = add_peers(workload) if add_peers else {}
    samplers |= {name: sampler for name, (sampler, _) in peers.items()}
    samples = measure_rounds(samplers, rounds, title=workload.name)
    facts |= {name: metadata for name, (_, metadata) in peers.items()}
    moved = {m.key: m.bytes_moved for m in methods} | dict.fromkeys(peers, workload.dense_bytes)
    results = results_of(workload, methods, samples, moved, facts)
    return results, samples


def results_of(
    workload: Workload,
    methods: list[Method],
    samples: Samples,
    moved: dict[str, int],
    facts: dict[str, dict[str, Any]],
    suffix: str = "",
) -> list[Result]:
    """One result per sampler, with its bytes and the fraction of the read loop they are."""
    bandwidth = workload.dense_bytes / samples.median(f"read_loop{suffix}")
    by_key = {m.key: m for m in methods}
    results = []
    for key, num_bytes in moved.items():
        seconds = samples.median(f"{key}{suffix}")
        method = by_key.get(key)
        metadata = {
            "shape": workload.shape,
            "dtype": dtype_name(workload.dtype),
            "batch": workload.batch,
            "context": workload.context,
            "threads": workload.threads,
            "device": workload.device,
            "bytes_moved": num_bytes,
            "bytes_per_second": num_bytes / seconds,
            "fraction_of_read_loop": num_bytes / seconds / bandwidth,
            **(method.metadata if method else {}),
            **(method.setting.facts() if method and method.setting else {}),
            **facts[key],
            **sample_fields(samples),
        }
        name, _, stage = key.partition("/")
        title = f"{workload.name}/{stage}" if stage else workload.name
        results.append(Result(title, f"{name}{suffix}", samples.values[f"{key}{suffix}"], metadata))
    return results


def sample_fields(samples: Samples) -> dict[str, Any]:
    """Metadata about the rounds."""
    fields: dict[str, Any] = {"rounds_dropped": samples.rounds_dropped}
    if samples.other_load is not None:
        fields["other_load"] = samples.other_load
    if samples.marked:
        fields["marked"] = samples.marked
    if samples.interrupted:
        fields["interrupted"] = "fewer rounds than asked for"
    return fields
