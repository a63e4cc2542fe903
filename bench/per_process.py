"""The frame of benchmarks whose values are from a process each."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from quest_compile.bench import options
from quest_compile.bench.decode.methods import names_of
from quest_compile.bench.decode.probe import Probe
from quest_compile.bench.load import LoadMeter
from quest_compile.bench.ops.inputs import Setting
from quest_compile.bench.report.more_tables import quantities
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.shapes import DTYPES, workload_name
from quest_compile.ops.limits import SUMMARIES

# Workload, what to start, options -> results without the fields that all have.
Measure = Callable[[str, Probe, argparse.Namespace], list[Result]]


def main(
    name: str,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    measure: Measure,
    quick: dict[str, Any],
) -> int:
    """Run ``measure`` for every method and workload asked for."""
    options.add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(summaries=["minmax"], **quick)
        args = parser.parse_args(argv)
    options.check(parser, args)
    if args.model:
        parser.error(f"bench {name} makes its models itself: --model-shape, not --model")
    settings = tuple(
        Setting(*s) for s in itertools.product(args.summaries or SUMMARIES, args.budgets)
    )
    options.check_methods(parser, args, names_of(list(settings), None))
    wanted = args.methods
    if args.quick and wanted is None:
        wanted = ["dense_transformers", *(s.name for s in settings)]
    methods = names_of(list(settings), wanted)
    cases = list(itertools.product(args.dtype, args.batch, args.contexts, args.threads))
    if args.list:
        print(f"methods: {', '.join(methods)}")
        print("\n".join(_title(name, args, case) for case in cases))
        return 0
    recorder = options.recorder_of(name, args)
    status = None
    try:
        _measure_all(name, args, cases, methods, settings, measure, recorder)
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print(quantities(recorder.results))
    return status or recorder.status()


def _measure_all(
    name: str,
    args: argparse.Namespace,
    cases: list[tuple[str, int, int, int]],
    methods: list[str],
    settings: tuple[Setting, ...],
    measure: Measure,
    recorder: Recorder,
) -> None:
    from tqdm import tqdm

    jobs = list(itertools.product(cases, methods))
    for case, method in (bar := tqdm(jobs, desc=f"bench {name}", unit="method")):
        bar.set_postfix_str(method)
        title = _title(name, args, case)
        if any(r.workload.startswith(title) and r.method == method for r in recorder.results):
            continue
        dtype, batch, context, threads = case
        probe = Probe(
            method,
            args.model_shape,
            dtype,
            args.layers,
            context,
            batch,
            threads,
            args.device,
            settings,
        )
        meter = LoadMeter()
        try:
            results = measure(title, probe, args)
        except RefusedError as error:
            recorder.refuse(title, error)
            continue
        common = {"dtype": dtype, "batch": batch, "context": context, "threads": threads}
        common |= {"device": args.device, "shape": shape_of(args)} | _load(meter, args.max_load)
        for result in results:
            result.metadata |= common
            # Load changes times, not sizes.
            if result.unit == "byte":
                result.metadata.pop("marked", None)
        recorder.add(results)


def _load(meter: LoadMeter, max_load: float) -> dict[str, Any]:
    load = meter.other_load()
    if load is None:
        return {}
    if load <= max_load:
        return {"other_load": load}
    text = f"other processes used {load:.2g} cores, more than {max_load:g}"
    return {"other_load": load, "marked": text}


def shape_of(args: argparse.Namespace) -> str:
    return f"{args.model_shape}-{args.layers}layers" if args.layers else args.model_shape


def _title(name: str, args: argparse.Namespace, case: tuple[str, int, int, int]) -> str:
    dtype, batch, context, threads = case
    return f"{name}/" + workload_name(shape_of(args), DTYPES[dtype], batch, context, threads)
