"""Results as pyperf JSON: one file per method, the same benchmark names in each.

pyperf's own runner starts a process per benchmark and cannot interleave methods; so the samples are
taken by ``rounds.py`` and only the objects and files are pyperf's. ``pyperf compare_to dense.json
quest.json``, ``stats``, ``show`` and ``hist`` work on them.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quest_compile.identity import identity

# Results that are to be compared must agree in these.
CONDITIONS = ("commit", "cpu_model_name", "torch", "transformers", "kernels")


class RefusedError(RuntimeError):
    """What was to be measured did not happen, or gave a wrong result."""


@dataclasses.dataclass
class Result:
    """Values of one workload by one method; ``metadata``: str, int and float by name.

    ``marked`` in metadata says why a result is not to be trusted.
    """

    workload: str
    method: str
    values: Sequence[float]
    metadata: dict[str, Any]
    unit: str = "second"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def marked(self) -> str:
        return self.metadata.get("marked", "")


class Recorder:
    """Keeps results in ``folder`` (nowhere if None) as they come, one file per method.

    ``resume``: go on with what the folder has, without what was interrupted or is marked: that is
    to be measured again, as is what was refused, which has no result.

    Raises:
        ValueError: the folder holds results and ``resume`` is not set, or their conditions differ.
    """

    def __init__(self, name: str, folder: Path | None, *, resume: bool = False) -> None:
        self.name = name
        self.folder = folder
        self.results: list[Result] = []
        self.refused: list[str] = []
        self._identity = identity()
        self._earlier_methods: set[str] = set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            earlier = load_results(folder)
            if earlier and not resume:
                raise ValueError(f"--output {folder} holds results already: add --resume")
            self.results = [r for r in earlier if not r.marked and "interrupted" not in r.metadata]
            self._earlier_methods = {r.method for r in earlier}
            self._check_conditions()
        elif resume:
            raise ValueError("--resume needs --output, the folder of the results to continue")

    def has(self, workload: str, methods: Iterable[str] = ()) -> bool:
        """Is ``workload`` done, by all of ``methods`` or by any?"""
        done = {r.method for r in self.results if r.workload == workload}
        return done >= set(methods) if methods else bool(done)

    def add(self, results: Iterable[Result]) -> None:
        """Add or replace, and write the files."""
        for result in results:
            key = (result.workload, result.method)
            self.results = [r for r in self.results if (r.workload, r.method) != key]
            result.metadata = self._identity | {"benchmark": self.name} | result.metadata
            self.results.append(result)
        self._write()

    def refuse(self, workload: str, error: Exception) -> None:
        """Say and remember that there is no result."""
        self.refused.append(f"{workload}: {error}")
        print(f"REFUSED {workload}: {error}", file=sys.stderr)
        self._write()

    def status(self) -> int:
        """The exit status: 0 if every result may be trusted."""
        for result in self.results:
            if result.marked:
                print(f"MARKED {result.workload}, {result.method}: {result.marked}")
        return 1 if self.refused or any(r.marked for r in self.results) else 0

    def _write(self) -> None:
        """One file per method; none where no result of it is left."""
        if self.folder is None:
            return
        write_results(self.folder, self.results)
        for method in self._earlier_methods - {r.method for r in self.results}:
            (self.folder / f"{method}.json").unlink(missing_ok=True)

    def _check_conditions(self) -> None:
        for result in self.results:
            for name in CONDITIONS:
                was, now = result.metadata.get(name), self._identity.get(name)
                if was != now:
                    raise ValueError(
                        f"--resume: {self.folder} was measured with {name} {was!r}, this is {now!r}"
                    )


def write_results(folder: Path, results: Iterable[Result]) -> None:
    """``folder/<method>.json`` for each method."""
    import pyperf

    by_method: dict[str, list[Result]] = {}
    for result in results:
        by_method.setdefault(result.method, []).append(result)
    for method, own in by_method.items():
        benchmarks = []
        for result in own:
            fields = {"name": result.workload, "unit": result.unit, "method": method}
            run = pyperf.Run(
                [float(value) for value in result.values],
                metadata=result.metadata | fields,
                collect_metadata=False,
            )
            benchmarks.append(pyperf.Benchmark([run]))
        path, new = folder / f"{method}.json", folder / f"{method}.json.new"
        pyperf.BenchmarkSuite(benchmarks).dump(str(new), compact=False, replace=True)
        new.replace(path)


def load_results(folder: Path) -> list[Result]:
    """The results of all JSON files of ``folder``.

    Raises:
        ValueError: a file is not of pyperf.
    """
    import pyperf

    results = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("metrics-"):
            continue
        try:
            suite = pyperf.BenchmarkSuite.load(str(path))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a pyperf result: {error}") from error
        for benchmark in suite:
            metadata = benchmark.get_metadata()
            unit = metadata.pop("unit", "second")
            name, method = metadata.pop("name"), metadata.pop("method", path.stem)
            results.append(Result(name, method, benchmark.get_values(), metadata, unit))
    return results
