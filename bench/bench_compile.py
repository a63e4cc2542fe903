"""What compiling costs: time to the first token, cold and warm, and the seconds of the passes.

Every value is from a process of its own: cold, with an empty cache of compiled code; warm, with
what the process before left there. Loading the model and filling the cache do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence

from quest_compile.bench import options, per_process
from quest_compile.bench.decode.probe import Probe, run_probe
from quest_compile.bench.results import Result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; ``--output FOLDER`` keeps pyperf JSON."""
    parser = options.parser_of("compile", __doc__, rounds=2, contexts="8K")
    return per_process.main("compile", parser, argv, _measure, quick={"layers": 3, "rounds": 1})


def _measure(title: str, probe: Probe, args: argparse.Namespace) -> list[Result]:
    """Names end in what was timed."""
    values: dict[str, list[float]] = {}
    facts: dict[str, int] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                found = run_probe(dataclasses.replace(probe, cache_folder=folder))
                values.setdefault(f"first token, {state}", []).append(found["first_token"])
                values.setdefault(f"second token, {state}", []).append(found["second_token"])
                if "passes" in found:
                    values.setdefault("passes", []).append(found["passes"])
                    facts |= {k: int(found[k]) for k in ("sparse_layers", "sparse_calls")}
    return [
        Result(f"{title}/{what}", probe.method, seconds, dict(facts))
        for what, seconds in values.items()
    ]
