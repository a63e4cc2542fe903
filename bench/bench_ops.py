"""Decode attention of one layer: our operators against scaled_dot_product_attention and llama.cpp.

All methods run in one process, in interleaved rounds. Every call takes another copy of the caches,
after a read of other memory and an untimed call on yet another copy: keys and values are cold, code
is not, and threads are awake. Beside each time stand the bytes that had to move, and the fraction
this is of a plain read of as many bytes as the caches have, measured in the same rounds. Before
anything is timed, results are compared with float64 and counters prove which kernel served.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch

from quest_compile.bench import options, parsers
from quest_compile.bench.ops import overhead
from quest_compile.bench.ops.inputs import Workload
from quest_compile.bench.ops.levels import measure_levels
from quest_compile.bench.ops.measure import measure
from quest_compile.bench.ops.methods import TORCH_METHODS
from quest_compile.bench.records import print_table
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.rounds import Rounds
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import SHAPES, Layer
from quest_compile.choices import DTYPES

# One step from the shape of Llama-3-8B in one direction each.
_SHAPE_TABLE = [Layer(32, 8, d) for d in (64, 96, 128, 256)]
_SHAPE_TABLE += [Layer(8 * group, 8, 128) for group in (1, 7, 8)]


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """Every combination asked for."""
    name = args.model_shape or "llama-3-8b"
    layers = {name: SHAPES[name].layer}
    if args.shapes:
        layers = {f"q{x.num_q_heads}-kv{x.num_kv_heads}-d{x.head_dim}": x for x in _SHAPE_TABLE}
    return [
        Workload(shape, layer, context, getattr(torch, dtype), batch, threads, args.device)
        for (shape, layer), dtype, batch, context, threads in itertools.product(
            layers.items(), args.dtype, args.batch, args.contexts, args.threads
        )
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; ``--output FOLDER`` keeps pyperf JSON."""
    parser = parsers.ops()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(contexts=[4096, 32768], rounds=5, method_seconds=2.0)
        args = parser.parse_args(argv)
    if args.shapes:
        parser.set_defaults(
            dtype=list(DTYPES), contexts=[16384], page_sizes=[16, 32], no_overhead=True
        )
        args = parser.parse_args(argv)
    options.check(parser, args)
    workloads, settings = workloads_of(args), options.settings_of(args)
    known = ["read_loop", "dense_decode", *(s.name for s in settings), *TORCH_METHODS]
    known += ["llama_cpp", "llama_cpp_flash"]
    options.check_methods(parser, args, known)
    if args.shapes or args.isa:
        args.methods = args.methods or ["dense_decode", *(s.name for s in settings)]
    if args.list:
        print("methods: " + ", ".join(args.methods or known))
        print("\n".join(w.name for w in workloads))
        return 0
    recorder = options.recorder_of("ops", args)
    rounds = options.rounds_of(args)
    status = None
    try:
        _measure_all(args, workloads, settings, recorder, rounds)
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print_table([_row(r, recorder) for r in recorder.results])
    return status or recorder.status()


def _measure_all(
    args: argparse.Namespace,
    workloads: list[Workload],
    settings: list[Setting],
    recorder: Recorder,
    rounds: Rounds,
) -> None:
    peers = None
    possible = ["read_loop", "dense_decode", *(s.name for s in settings), *TORCH_METHODS]
    if not (args.no_llama_cpp or args.shapes or args.isa):
        from quest_compile.bench.ops.llama_cpp_peer import peers_of

        peers = peers_of(args.methods)
    for workload in workloads:
        name = workload.name
        methods = [f"read_loop@{level}" for level in args.isa or ()] or args.methods or possible
        if recorder.has(name, methods):
            continue
        try:
            if args.isa:
                found, samples = measure_levels(args.isa, workload, settings, args.methods, rounds)
            else:
                found, samples = measure(workload, settings, args.methods, rounds, peers)
        except RefusedError as error:
            recorder.refuse(name, error)
            continue
        recorder.add(found)
        if samples.interrupted:
            raise KeyboardInterrupt
    is_done = all(recorder.has(name, [overhead.METHOD]) for name in overhead.WORKLOADS)
    if not (args.no_overhead or args.isa or args.methods or is_done):
        recorder.add(overhead.measure_overhead(rounds))


def _row(result: Result, recorder: Recorder) -> dict[str, object]:
    """A line of the table; ratios are to dense_decode of the same workload."""
    dense = [
        r.median
        for r in recorder.results
        if r.workload == result.workload and r.method == "dense_decode"
    ]
    facts = result.metadata
    return {
        "workload": result.workload,
        "method": result.method,
        "us": 1e6 * result.median,
        "MiB": facts["bytes_moved"] / 2**20 if "bytes_moved" in facts else "",
        "of read": facts.get("fraction_of_read_loop", ""),
        "dense / this": dense[0] / result.median if dense else "",
        "values": len(result.values),
        "dropped": facts["rounds_dropped"],
    }
