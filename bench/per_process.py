"""The frame of benchmarks whose values are from a process each."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from quest_compile.bench import options
from quest_compile.bench.bench_decode import shape_name
from quest_compile.bench.decode.fresh_start import SPARE, Probe
from quest_compile.bench.decode.methods import names_of
from quest_compile.bench.decode.models import check_context
from quest_compile.bench.load import LoadMeter, load_facts
from quest_compile.bench.ops.checks import check_kernels
from quest_compile.bench.progress import Progress
from quest_compile.bench.report.more_tables import quantities
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import workload_name

# Workload, what to start, options, who hears what goes on -> results without the fields that all
# have.
Measure = Callable[[str, Probe, argparse.Namespace, Callable[[str], None]], list[Result]]


def main(
    name: str,
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    measure: Measure,
    quick: dict[str, Any],
) -> int:
    """Run ``measure`` for every method and workload asked for."""
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(settings=["quest"], **quick)
        args = parser.parse_args(argv)
    options.check(parser, args)
    settings = tuple(options.settings_of(args))
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
    for context in args.contexts:
        check_context(args.model, context, SPARE)
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
    jobs = list(itertools.product(cases, methods))
    try:
        kernels = check_kernels(args.device)
    except RefusedError as error:
        recorder.refuse(f"bench {name}", error)
        return
    with Progress(f"bench {name}", len(jobs), "method") as progress:
        for case, method in jobs:
            title = _title(name, args, case)
            if not _is_done(recorder, title, method):
                probe = _probe_of(method, args, case, settings)
                meter = LoadMeter()
                doing = functools.partial(_tell, progress, method)
                doing("")
                try:
                    results = measure(title, probe, args, doing)
                except RefusedError as error:
                    recorder.refuse(title, error)
                else:
                    facts = _common(args, case) | kernels | load_facts(meter, args.max_load)
                    recorder.add(_with_facts(results, facts))
                progress.done(f"{title}, {method}")
            progress.update()


def _is_done(recorder: Recorder, title: str, method: str) -> bool:
    return any(r.method == method and r.workload.startswith(f"{title}/") for r in recorder.results)


def _tell(progress: Progress, method: str, what: str) -> None:
    progress.doing(f"{method}: {what}" if what else method)


def _probe_of(
    method: str,
    args: argparse.Namespace,
    case: tuple[str, int, int, int],
    settings: tuple[Setting, ...],
) -> Probe:
    dtype, batch, context, threads = case
    place = (context, batch, threads, args.device)
    return Probe(method, args.model_shape, dtype, args.layers, *place, settings, args.model)


def _common(args: argparse.Namespace, case: tuple[str, int, int, int]) -> dict[str, Any]:
    dtype, batch, context, threads = case
    found = {"dtype": dtype, "batch": batch, "context": context, "threads": threads}
    return found | {"device": args.device, "shape": shape_name(args)}


def _with_facts(results: list[Result], facts: dict[str, Any]) -> list[Result]:
    for result in results:
        result.metadata |= facts
        # Load changes times, not sizes.
        if result.unit == "byte":
            result.metadata.pop("marked", None)
    return results


def _title(name: str, args: argparse.Namespace, case: tuple[str, int, int, int]) -> str:
    dtype, batch, context, threads = case
    return f"{name}/" + workload_name(shape_name(args), dtype, batch, context, threads)
