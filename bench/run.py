"""The entry of torchbench's userbenchmarks: ``run(["ops", "--quick"])`` writes flat metrics."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from quest_compile.bench.__main__ import main
from quest_compile.bench.records import record_folder
from quest_compile.bench.results import load_results
from quest_compile.identity import identity

# Those that keep their results as pyperf JSON.
DRIVEN = ("ops", "decode", "prefill", "compile", "memory", "longrun", "overhead")


def run(args: Sequence[str]) -> Path:
    """Run the benchmark that ``args`` name first, one of ``DRIVEN``, with its options.

    Returns:
        ``metrics-TIME.json`` in the folder of ``--output`` or ``--record`` (by default
        ``.userbenchmark/quest_compile-NAME/TIME``): ``name``, ``environ``, and ``metrics``, the
        median of each result in seconds or bytes by workload and method.

    Raises:
        ValueError: no such benchmark is named, it ended with an error, or it measured nothing.
        SystemExit: an option is wrong.
    """
    name = args[0] if args else "nothing"
    if name not in DRIVEN:
        raise ValueError(
            f"args must begin with one of {', '.join(DRIVEN)}, got {name!r} "
            "(gpu-check writes results of its own)"
        )
    time = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
    parser = argparse.ArgumentParser(prog=f"quest-compile bench {name}", add_help=False)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--record", action="store_true")
    own, others = parser.parse_known_args(args[1:])
    folder = own.output
    if folder is None and own.record:
        folder = record_folder(name)
    elif folder is None:
        folder = Path(".userbenchmark") / f"quest_compile-{name}" / time
    status = main([name, *others, "--output", str(folder)])
    if status == 2:
        raise ValueError(f"bench {name} ended with an error (status 2), printed above")
    results = load_results(folder) if folder.is_dir() else []
    if not results:
        raise ValueError(f"bench {name} measured nothing (status {status})")
    metrics = {f"{r.workload}, {r.method}": r.median for r in results}
    marked = {f"{r.workload}, {r.method}": r.marked for r in results if r.marked}
    path = folder / f"metrics-{time}.json"
    found = {"name": f"quest_compile-{name}", "environ": identity(), "metrics": metrics}
    path.write_text(json.dumps(found | {"marked": marked}, indent=1) + "\n", encoding="utf-8")
    return path
