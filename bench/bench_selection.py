"""Time of a decode step of one attention layer with each way to select pages.

32 query and 8 KV heads of 128, bfloat16, 16,384 tokens: random keys with RoPE ("random walk, heavy
channels" of sketch_keys.py), random values, and queries that point at some keys, twice as sharp, so
that top_p finds something to leave out. A value is the mean of eight consecutive steps, with other
queries each, over four copies of the cache in turn, as four layers would be, which leaves them
cold. Ways take turns in one process. Before anything is timed, counters prove that every way is
what its name says.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quest_compile.bench import options
from quest_compile.bench.ops.checks import check_kernels
from quest_compile.bench.ops.measure import sample_fields
from quest_compile.bench.ops.methods import read_loop
from quest_compile.bench.progress import say
from quest_compile.bench.report.more_tables import selection
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.rounds import Rounds, measure_rounds
from quest_compile.bench.selection_ways import (
    KEYS,
    SHARPNESS,
    WAYS,
    Cache,
    inputs,
    method_of,
    prove,
    way,
)
from quest_compile.bench.shapes import dtype_name, workload_name


def measure(
    title: str, budget: int, queries: list[Tensor], caches: list[Cache], rounds: Rounds
) -> Iterator[Result]:
    """One result per way, and the read loop's.

    Raises:
        RefusedError: plain torch serves, or a way is not what its name says.
    """
    kernels = check_kernels("cpu")
    samplers = {name: way(own, budget, queries, caches) for name, own in WAYS.items()}
    facts = {name: prove(name, sample, len(caches)) for name, sample in samplers.items()}
    keys, values = caches[0]
    num_bytes = keys.nbytes + values.nbytes
    read = read_loop(num_bytes, "cpu")

    def sample_read(number: int) -> float:
        start = time.perf_counter()
        read(None)
        return time.perf_counter() - start

    samples = measure_rounds(samplers | {"read_loop": sample_read}, rounds, title)
    facts["read_loop"] = {"bytes_moved": num_bytes}
    bandwidth = num_bytes / samples.median("read_loop")
    for name, own in facts.items():
        per_second = own["bytes_moved"] / samples.median(name)
        metadata = {
            "budget": budget,
            "context": keys.shape[2],
            "dtype": dtype_name(keys.dtype),
            "threads": torch.get_num_threads(),
            "device": "cpu",
            "keys": KEYS,
            "sharpness": SHARPNESS,
            "bytes_per_second": per_second,
            "fraction_of_read_loop": per_second / bandwidth,
            **({"way": name} if name in WAYS else {}),
            **own,
            **kernels,
            **sample_fields(samples),
        }
        yield Result(title, method_of(name), samples.values[name], metadata)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; ``--output FOLDER`` keeps pyperf JSON."""
    parser = argparse.ArgumentParser(
        prog="quest-compile bench selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="5 rounds, at budget 2048")
    options.add_output_arguments(parser)
    add("--budgets", type=options.token_list, default=[1024, 2048], help="comma-separated tokens")
    add("--rounds", type=int, default=25, help="samples per way; default 25")
    add("--max-load", type=float, default=0.25, help="cores others may use in a round that counts")
    if (args := parser.parse_args(argv)).quick:
        parser.set_defaults(budgets=[2048], rounds=5)
        args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    recorder = options.recorder_of("selection", args)
    status = None
    try:
        _measure_all(args, recorder)
    except KeyboardInterrupt:
        status = options.interrupted()
    if recorder.results:
        print(selection(recorder.results))
    return status or recorder.status()


def _measure_all(args: argparse.Namespace, recorder: Recorder) -> None:
    say("bench selection: making keys")
    queries, caches = inputs()
    keys = caches[0][0]
    rounds = Rounds(args.rounds, float("inf"), args.max_load)
    methods = [*map(method_of, WAYS), "read_loop"]
    for budget in args.budgets:
        threads = torch.get_num_threads()
        title = workload_name("llama-3-8b", keys.dtype, 1, keys.shape[2], threads)
        title += f"/budget{budget}"
        if recorder.has(title, methods):
            continue
        say(f"bench selection: {title}")
        try:
            results = list(measure(title, budget, queries, caches, rounds))
        except RefusedError as error:
            recorder.refuse(title, error)
            continue
        recorder.add(results)
        if any("interrupted" in r.metadata for r in results):
            raise KeyboardInterrupt
