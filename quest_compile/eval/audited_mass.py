"""The attention mass that the audited calls of a backend kept."""

from __future__ import annotations

from typing import Any


class AuditedMass:
    """Of the calls of ``backend`` from now on."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._before = self._totals()

    def kept(self) -> float | None:
        """Mean over the audited queries of query heads; None without any. Waits for the device."""
        mass, queries = (now - before for now, before in zip(self._totals(), self._before))
        return mass / queries if queries else None

    def _totals(self) -> tuple[float, int]:
        graphs = self._backend.report().graphs
        found = [audit for graph in graphs for _, audit in graph.audited_rows()]
        kept = [(a.kept_mass * a.queries, a.queries) for a in found if a is not None and a.queries]
        return sum(mass for mass, _ in kept), sum(queries for _, queries in kept)
