"""What compiling costs: time to the first token, cold and warm, and the seconds of the passes.

Every value is from a process of its own: cold, with an empty cache of compiled code; warm, with
what the process before left there. Loading the model and filling the cache do not count. Afterwards
the process decodes with the model as it is, uncompiled, from the same cache, and the results say
how many tokens are alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence

from quest_compile.bench import parsers, per_process
from quest_compile.bench.decode.fresh_start import Probe
from quest_compile.bench.decode.probe import facts_of, run_probe
from quest_compile.bench.results import Result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; ``--output FOLDER`` keeps pyperf JSON."""
    quick = {"layers": 3, "rounds": 1}
    return per_process.main("compile", parsers.compile_(), argv, _measure, quick=quick)


def _measure(
    title: str, probe: Probe, args: argparse.Namespace, doing: Callable[[str], None]
) -> list[Result]:
    """Names end in what was timed."""
    values: dict[str, list[float]] = {}
    processes = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                doing(f"{state}, round {number + 1} of {args.rounds}")
                found = run_probe(dataclasses.replace(probe, cache_folder=folder))
                processes.append(found)
                for token in ("first", "second"):
                    seconds = found.values[f"{token}_token"]
                    values.setdefault(f"{token} token, {state}", []).append(seconds)
                if "passes" in found.values:
                    values.setdefault("passes", []).append(found.values["passes"])
    facts = facts_of(processes)
    return [
        Result(f"{title}/{what}", probe.method, seconds, dict(facts))
        for what, seconds in values.items()
    ]
