"""The report of a folder of results, and the tables of the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from quest_compile.bench.report.more_tables import TABLES
from quest_compile.bench.report.names import is_quest, today
from quest_compile.bench.report.stage_bars import too_many_bars
from quest_compile.bench.results import Result, load_results

_ROOT = Path(__file__).resolve().parents[2]
_MARKED = re.compile(
    r"(<!-- bench: (\w+)((?:\s+(?!-->)\S+)+)\s+-->\n).*?(<!-- bench end -->)", re.DOTALL
)


def tables_for(results: Sequence[Result]) -> list[str]:
    """Which tables say something about these results."""
    benchmark = results[0].metadata.get("benchmark")
    if benchmark != "ops":
        return ["decode" if benchmark == "decode" else "quantities"]
    if any("@" in r.method for r in results):
        return ["levels"]
    if len({r.metadata.get("shape") for r in results if "shape" in r.metadata}) > 1:
        return ["shapes"]
    if len({r.metadata.get("threads") for r in results if "threads" in r.metadata}) > 1:
        return ["threads"]
    found = ["attention"]
    if any(is_quest(r.method) for r in results):
        found += ["contexts", "stages"]
    if any(r.workload.startswith("overhead/") for r in results):
        found.append("overhead")
    return found


def conditions(results: Sequence[Result]) -> str:
    """One sentence: where, when and with what."""
    facts = results[0].metadata
    threads = sorted({r.metadata["threads"] for r in results if "threads" in r.metadata})
    machine = facts.get("cuda_device") or f"{facts['cpu_count']} cores of {facts['cpu_model_name']}"
    text = (
        f"{machine}, kernels {facts['kernels']}, torch {facts['torch']}, "
        f"commit {facts['commit']}, {facts['date'][:10]}"
    )
    if threads:
        text += f", {'/'.join(map(str, threads))} threads"
    marked = sum(bool(r.marked) for r in results)
    if marked:
        text += f"; {marked} of {len(results)} results are marked (!): measured under load"
    return text + "."


def document(folder: Path, plots: Sequence[str] = (), accuracy: Path | None = None) -> str:
    """Markdown of all tables that fit; ``plots`` are names of SVG files beside it, ``accuracy`` the
    file whose answers they show.

    Raises:
        ValueError: no results there.
    """
    results = load_results(folder)
    if not results:
        raise ValueError(f"{folder} holds no results")
    parts = [f"# {folder.name}\n", conditions(results) + "\n"]
    for name in tables_for(results):
        parts += [f"## {name.capitalize()}\n", TABLES[name](results)]
    if accuracy is not None and plots:
        name = "/".join(accuracy.resolve().parts[-2:])
        parts.append(f"Right answers in the plots are those of `{name}`.\n")
    parts += [f"{sentence}\n" for sentence in too_many_bars(results)]
    parts += [f"![{name.removesuffix('.svg')}]({name})\n" for name in plots]
    return "\n".join(parts)


def with_tables(text: str, root: Path = _ROOT) -> str:
    """``text`` with every marked table made anew, methods by the names of ``today``:

        <!-- bench: TABLE FOLDER -->
        <!-- bench end -->

    The table ``costs`` takes several folders, with spaces or line ends between them.

    Raises:
        ValueError: no such table, several folders for another, or no results in a folder, which is
            relative to ``root``.
    """

    def table(match: re.Match[str]) -> str:
        begin, name, folders, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        groups = {folder: load_results(root / folder) for folder in folders.split()}
        if len(groups) > 1 and name != "costs":
            raise ValueError(f"table {name}: expected one folder, got {', '.join(groups)}")
        for folder, results in groups.items():
            if not results:
                raise ValueError(f"{folder} holds no results")
        shown = [t for results in groups.values() for r in results if (t := today(r))]
        made = TABLES[name](shown)
        return f"{begin}{made}\n{_all_conditions(list(groups.values()))}\n{end}"

    return _MARKED.sub(table, text)


def _all_conditions(groups: Sequence[Sequence[Result]]) -> str:
    """A line for groups alike; with their benchmarks where there are several lines."""
    found: dict[str, list[str]] = {}
    for results in groups:
        found.setdefault(conditions(results), []).append(results[0].metadata["benchmark"])
    if len(found) == 1:
        return next(iter(found))
    return "\n".join(f"{', '.join(names)}: {text}" for text, names in found.items())
