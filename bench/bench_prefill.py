"""Prefill of a prompt: attention of one layer, and time to the first token of a whole model.

Attention is causal, over a prompt in an empty cache; what a call prepares per prompt, such as
repeated heads, is part of its time. "gemm": the time that the operations of causal attention would
take as products of matrices, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quest_compile.bench import options, parsers
from quest_compile.bench.decode.models import check_context, own_model, random_model
from quest_compile.bench.ops.measure import sample_fields
from quest_compile.bench.prefill.attention import (
    gemm_sampler,
    make_calls,
    sampler_of,
    useful_flops,
)
from quest_compile.bench.prefill.models import METHODS, make_samplers
from quest_compile.bench.report.more_tables import quantities
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.rounds import measure_rounds
from quest_compile.bench.shapes import SHAPES, workload_name

_ATTENTION = ("dense_prefill", "dense_prefill_mask", "sdpa_causal", "sdpa_enable_gqa", "sdpa_mask")
Samplers = dict[str, Callable[[int], float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; ``--output FOLDER`` keeps pyperf JSON."""
    parser = parsers.prefill()
    args = parser.parse_args(argv)
    options.check(parser, args)
    options.check_methods(parser, args, [*_ATTENTION, "gemm", *METHODS])
    if args.device != "cpu":
        parser.error("--device: quest::dense_prefill has kernels for CPUs only")
    if args.quick:
        args.contexts, args.layers, args.rounds = [2048], args.layers or 2, min(args.rounds, 5)
    cells = list(itertools.product(args.threads, args.dtype, args.batch, args.contexts))
    if args.list:
        for cell in cells:
            print("/".join(map(str, cell)), *_ATTENTION, "gemm", *METHODS)
        return 0
    recorder = options.recorder_of("prefill", args)
    status = None
    try:
        for threads, dtype, batch, context in cells:
            torch.set_num_threads(threads)
            name = workload_name(args.model or args.model_shape, dtype, batch, context, threads)
            for measured, make in (("attention", _attention), ("first token", _first_token)):
                _measure(f"{name}/{measured}", make, args, dtype, batch, context, recorder)
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print(quantities(recorder.results))
    return status or recorder.status()


def _measure(
    name: str,
    make: Callable[..., tuple[Samplers, dict[str, Any]]],
    args: argparse.Namespace,
    dtype: str,
    batch: int,
    context: int,
    recorder: Recorder,
) -> None:
    if recorder.has(name):
        return
    try:
        samplers, facts = make(args, getattr(torch, dtype), batch, context)
    except RefusedError as error:
        recorder.refuse(name, error)
        return
    samplers = {key: samplers[key] for key in samplers if not args.methods or key in args.methods}
    if not samplers:
        return
    samples = measure_rounds(samplers, options.rounds_of(args), name)
    facts |= {"dtype": dtype, "batch": batch, "context": context, "device": "cpu"}
    facts |= {"threads": torch.get_num_threads(), **sample_fields(samples)}
    recorder.add(Result(name, key, values, dict(facts)) for key, values in samples.values.items())


def _attention(
    args: argparse.Namespace, dtype: torch.dtype, batch: int, context: int
) -> tuple[Samplers, dict[str, Any]]:
    layer = SHAPES[args.model_shape].layer
    flops = useful_flops(layer, context, batch)
    calls = make_calls(layer, context, batch, dtype)
    samplers = {name: sampler_of(call) for name, call in calls.items()}
    return samplers | {"gemm": gemm_sampler(flops, dtype)}, {"flops": flops}


def _first_token(
    args: argparse.Namespace, dtype: torch.dtype, batch: int, context: int
) -> tuple[Samplers, dict[str, Any]]:
    check_context(args.model, context, 1)
    methods = tuple(name for name in METHODS if not args.methods or name in args.methods)
    if not methods:
        return {}, {}
    if args.model:
        model = own_model(args.model, dtype, "cpu")
    else:
        model = random_model(SHAPES[args.model_shape], dtype, "cpu", args.layers)
    return make_samplers(model, context, batch, methods)
