"""The entry of torchbench's userbenchmarks: ``run(["ops", "--quick"])`` writes flat metrics."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from quest_compile.bench.__main__ import main
from quest_compile.bench.identity import identity
from quest_compile.bench.results import load_results


def run(args: Sequence[str]) -> Path:
    """Run the benchmark that ``args`` name first, with its options.

    Returns:
        ``metrics-TIME.json`` in the folder of ``--output`` (by default
        ``.userbenchmark/quest_compile-NAME/TIME``): ``name``, ``environ``, and ``metrics``, the
        median of each result in seconds or bytes by workload and method.

    Raises:
        ValueError: no benchmark is named, or it measured nothing.
    """
    args = list(args)
    if not args or args[0].startswith("-"):
        raise ValueError(f"args must begin with the name of a benchmark, got {args}")
    time = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
    if "--output" in args:
        folder = Path(args[args.index("--output") + 1])
    else:
        folder = Path(".userbenchmark") / f"quest_compile-{args[0]}" / time
        args += ["--output", str(folder)]
    status = main(args)
    results = load_results(folder) if folder.is_dir() else []
    if not results:
        raise ValueError(f"bench {args[0]} measured nothing (status {status})")
    metrics = {f"{r.workload}, {r.method}": r.median for r in results}
    marked = {f"{r.workload}, {r.method}": r.marked for r in results if r.marked}
    path = folder / f"metrics-{time}.json"
    found = {"name": f"quest_compile-{args[0]}", "environ": identity(), "metrics": metrics}
    path.write_text(json.dumps(found | {"marked": marked}, indent=1) + "\n", encoding="utf-8")
    return path
