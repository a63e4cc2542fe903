"""Decoding end to end: a whole model, one token per step, dense and with Quest side by side.

Every method decodes one token per round, greedily, each on a cache of its own; medians. The model
has random weights (or is yours, --model) and the cache is filled with plausible keys and values
instead of a prefill, which would take longer than everything else: see decode/models.py. Before
anything is timed, a step of each rewritten graph is run node by node and every attention call
compared with float64; counters prove for every step which kernels served. "dense_transformers" is
what torch.compile makes of the model as it is. A slow method decodes fewer tokens
(--method-seconds); the results say how many.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quest_compile.bench import options, parsers
from quest_compile.bench.decode.decoder import Place
from quest_compile.bench.decode.measure import measure
from quest_compile.bench.decode.methods import DENSE_METHODS
from quest_compile.bench.decode.models import check_context, own_model, random_model
from quest_compile.bench.records import print_table
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import SHAPES, ModelShape, dtype_name, workload_name
from quest_compile.quantize import check_quantize, quantize

# Room behind the rounds: a step more is decoded before them, and disturbed rounds repeat.
SPARE = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; ``--output FOLDER`` keeps pyperf JSON."""
    parser = parsers.decode()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(contexts=[8192], rounds=8, method_seconds=4.0, layers=4)
        parser.set_defaults(settings=["quest"])
        args = parser.parse_args(argv)
    options.check(parser, args)
    try:
        check_quantize(args.quantize)
    except ValueError as error:
        parser.error(str(error))
    settings = options.settings_of(args)
    known = [*DENSE_METHODS, *(s.name for s in settings), "llama_cpp", "llama_cpp_flash"]
    options.check_methods(parser, args, known)
    if args.quick and args.methods is None:
        args.methods = ["dense_transformers", "dense_decode", *(s.name for s in settings)]
    cases = list(itertools.product(args.dtype, args.batch, args.contexts, args.threads))
    if args.list:
        print("methods: " + ", ".join(args.methods or known))
        print("\n".join(_name(args, *case) for case in cases))
        return 0
    for context in args.contexts:
        check_context(args.model, context, args.rounds + SPARE)
    recorder = options.recorder_of("decode", args)
    possible = [name for name in known if not name.startswith("llama_cpp")]
    status = None
    try:
        _measure_all(args, cases, settings, possible, recorder)
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print_table([_row(result, recorder) for result in recorder.results])
    return status or recorder.status()


def model_of(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    print(f"making {shape_name(args)}, {dtype_name(dtype)}", file=sys.stderr, flush=True)
    if args.model:
        model = own_model(args.model, dtype, args.device)
    else:
        model = random_model(SHAPES[args.model_shape], dtype, args.device, args.layers)
    return quantize(model, args.quantize)


def _shape(args: argparse.Namespace) -> ModelShape | None:
    """What llama.cpp gets; None where it gets nothing."""
    if args.model or args.quantize or args.no_llama_cpp:
        return None
    shape = SHAPES[args.model_shape]
    return dataclasses.replace(shape, num_layers=args.layers or shape.num_layers)


def shape_name(args: argparse.Namespace) -> str:
    weights = f"-{args.quantize}" if args.quantize else ""
    if args.model:
        return Path(args.model).name + weights
    layers = f"-{args.layers}layers" if args.layers else ""
    return args.model_shape + layers + weights


def _name(args: argparse.Namespace, dtype: str, batch: int, context: int, threads: int) -> str:
    return "decode/" + workload_name(shape_name(args), dtype, batch, context, threads)


def _measure_all(
    args: argparse.Namespace,
    cases: list[tuple[str, int, int, int]],
    settings: list[Setting],
    known: list[str],
    recorder: Recorder,
) -> None:
    model = None
    for case in cases:
        dtype, batch, context, threads = case
        title = _name(args, *case)
        if recorder.has(title, args.methods or known):
            continue
        torch.set_num_threads(threads)
        if model is None or model.dtype is not getattr(torch, dtype):
            model = model_of(args, getattr(torch, dtype))
        place = Place(context, context + args.rounds + SPARE, batch)
        rounds = options.rounds_of(args)
        try:
            found, samples = measure(
                title, model, settings, place, args.methods, rounds, recorder, _shape(args)
            )
        except RefusedError as error:
            recorder.refuse(title, error)
            continue
        for result in found:
            result.metadata["shape"] = shape_name(args)
        recorder.add(found)
        if samples.interrupted:
            raise KeyboardInterrupt


def _row(result: Result, recorder: Recorder) -> dict[str, object]:
    """A line of the table; ratios are to dense_transformers and dense_decode."""
    same = {r.method: r.median for r in recorder.results if r.workload == result.workload}
    facts = result.metadata
    ratios = {
        f"{name} / this": same[name] / result.median
        for name in ("dense_transformers", "dense_decode")
        if name in same
    }
    return {
        "workload": result.workload,
        "method": result.method,
        "ms/step": 1e3 * result.median,
        "MiB/step": facts["bytes_moved"] / 2**20,
        "of read": facts.get("fraction_of_read_loop", 1.0),
        "tokens read": facts.get("tokens_read_per_query", ""),
        "sparse/step": facts.get("sparse_calls_per_step", ""),
        **ratios,
        "steps": len(result.values),
        "dropped": facts["rounds_dropped"],
    }
