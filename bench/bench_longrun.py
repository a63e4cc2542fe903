"""A generation of thousands of tokens: does a step take as long at the end as at the beginning?

One result per window of steps. A method is marked when its last window takes more than a tenth
longer than its first, beyond what it reads more there; memory that the process gained is recorded.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from quest_compile.bench import bench_decode, options, parsers
from quest_compile.bench.decode.decoder import Decoder, Place
from quest_compile.bench.decode.methods import check_memory, decoder_of, names_of
from quest_compile.bench.decode.models import check_context
from quest_compile.bench.load import LoadMeter
from quest_compile.bench.ops.checks import check_kernels
from quest_compile.bench.progress import Progress
from quest_compile.bench.report.more_tables import quantities
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.shapes import workload_name

_NUM_WINDOWS = 8
_ALLOWED_DRIFT = 1.1


def main(argv: Sequence[str] | None = None) -> int:
    """``--rounds`` are the tokens to decode; of contexts, dtypes and batches the first counts."""
    parser = parsers.longrun()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(layers=4, rounds=400, settings=["quest"])
        args = parser.parse_args(argv)
    options.check(parser, args)
    if args.rounds < 4 * _NUM_WINDOWS:
        parser.error(f"--rounds must be at least {4 * _NUM_WINDOWS} here, got {args.rounds}")
    settings = options.settings_of(args)
    options.check_methods(parser, args, names_of(settings, None))
    # torch's own attention would take hours, and has nothing that could drift.
    methods = args.methods or ["dense_decode", *(s.name for s in settings)]
    dtype, context, batch = args.dtype[0], args.contexts[0], args.batch[0]
    shape = bench_decode.shape_name(args)
    title = "longrun/" + workload_name(shape, dtype, batch, context, args.threads[0])
    if args.list:
        print(f"methods: {', '.join(methods)}\n{title}, {args.rounds} tokens")
        return 0
    num_tokens = args.rounds + bench_decode.SPARE
    check_context(args.model, context, num_tokens)
    recorder = options.recorder_of("longrun", args)
    torch.set_num_threads(args.threads[0])
    torch._dynamo.config.recompile_limit = 64
    status = None
    try:
        kernels = check_kernels(args.device)
        missing = [m for m in methods if not _is_done(recorder, title, m)]
        model = bench_decode.model_of(args, getattr(torch, dtype)) if missing else None
        for name in missing:
            place = Place(context, context + num_tokens, batch)
            check_memory(model, settings, place, [name])
            facts = {"dtype": dtype, "batch": batch, "context": context} | kernels
            facts |= {"threads": args.threads[0], "device": args.device, "shape": shape}
            try:
                with Progress(name, args.rounds, "token") as progress:
                    progress.doing("filling its cache")
                    decoder = decoder_of(name, model, settings, place)
                    found = _windows(title, decoder, args, facts, progress)
            except RefusedError as error:
                recorder.refuse(title, error)
                continue
            recorder.add(found)
            if "interrupted" in found[0].metadata:
                raise KeyboardInterrupt
    except RefusedError as error:
        recorder.refuse(title, error)
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print(quantities(recorder.results))
    return status or recorder.status()


def _is_done(recorder: Recorder, title: str, method: str) -> bool:
    return any(r.method == method and r.workload.startswith(f"{title}/") for r in recorder.results)


def _windows(
    title: str,
    decoder: Decoder,
    args: argparse.Namespace,
    facts: dict[str, Any],
    progress: Progress,
) -> list[Result]:
    """Decode everything; one result per window."""
    decoder.prepare("reduce-overhead" if args.device == "cuda" else None, progress.doing)
    progress.done("checked and compiled")
    progress.doing("")
    decoder.sample(0)
    size = args.rounds // _NUM_WINDOWS
    before, meter = _resident_bytes(), LoadMeter()
    windows, sizes, loads = [], [], []
    is_whole = True
    try:
        for _ in range(_NUM_WINDOWS):
            values, read = [], 0
            for _ in range(size):
                values.append(decoder.sample(1))
                read += decoder.counts.last["bytes_read"]
                progress.update()
            windows.append(values)
            sizes.append(read // size)
            loads.append(meter.other_load())
    except KeyboardInterrupt:
        if len(windows) < 2:
            raise
        is_whole = False
    progress.done(f"{size * len(windows)} tokens")
    medians = [statistics.median(values) for values in windows]
    drift = medians[-1] / medians[0]
    found = decoder.facts()
    moved = found["weight_bytes"]
    allowed = _ALLOWED_DRIFT * (sizes[-1] + moved) / (sizes[0] + moved)
    shared = facts | found
    if not is_whole:
        shared["interrupted"] = f"{len(windows)} of {_NUM_WINDOWS} windows"
    shared |= {"drift": drift, "drift_allowed": allowed, "bytes_gained": _resident_bytes() - before}
    if max(loads) > args.max_load:
        shared["marked"] = f"other processes used {max(loads):.2g} cores"
    elif drift > allowed:
        shared["marked"] = f"the last steps take {drift:.2f} times as long as the first"
    return [
        Result(
            f"{title}/tokens {i * size}-{(i + 1) * size}",
            decoder.name,
            values,
            shared | {"kv_bytes_per_step": sizes[i], "other_load": loads[i]},
        )
        for i, values in enumerate(windows)
    ]


def _resident_bytes() -> int:
    """The largest resident set so far: what it gains during the run is a leak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
