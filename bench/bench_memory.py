"""What decoding needs in memory: the peak of a process, and what the page summaries add.

Every value is from a process of its own. On a CPU the peak is the largest resident set, compiler
included; on a GPU what torch allocated at most. Afterwards the process decodes with the model as it
is, uncompiled, from the same cache, and the results say how many tokens are alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from quest_compile.bench import parsers, per_process
from quest_compile.bench.decode.fresh_start import Probe
from quest_compile.bench.decode.probe import facts_of, run_probe
from quest_compile.bench.results import Result

_QUANTITIES = ("peak", "peak_before_decoding", "cache", "weights", "page_summaries")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; ``--output FOLDER`` keeps pyperf JSON."""
    quick = {"layers": 4, "contexts": [8192]}
    return per_process.main("memory", parsers.memory(), argv, _measure, quick=quick)


def _measure(
    title: str, probe: Probe, args: argparse.Namespace, doing: Callable[[str], None]
) -> list[Result]:
    """Names end in what was measured; a method without page summaries has no result for them."""
    found = []
    for number in range(args.rounds):
        doing(f"process {number + 1} of {args.rounds}")
        found.append(run_probe(probe))
    facts = facts_of(found)
    if summaries := found[0].values.get("page_summaries"):
        facts["page_summaries_over_cache"] = summaries / found[0].values["cache"]
    return [
        Result(
            f"{title}/{what}", probe.method, [f.values[what] for f in found], dict(facts), "byte"
        )
        for what in _QUANTITIES
        if found[0].values.get(what)
    ]
