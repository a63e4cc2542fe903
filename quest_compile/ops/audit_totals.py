"""What audits of an attention layer found: sums on the device, and what is made of them."""

from __future__ import annotations

import dataclasses

from torch import Tensor

TOTALS = (
    "calls",
    "audited_calls",
    "queries",
    "kept_mass",
    "output_error",
    "page_recall",
    "lost_mass_max",
    "output_error_max",
)


@dataclasses.dataclass(frozen=True)
class Audit:
    """What audited calls of one attention layer lost.

    Means and maxima are over the queries of query heads whose row did not fit the budget.

    calls: of the layer; ``audited_calls`` of them were audited.
    queries: queries of query heads that the figures are taken from; None below without any.
    kept_mass: softmax probability, by full attention, of the positions that were attended.
    output_error: |out - full| / |full| (L2).
    page_recall: of as many pages as were attended, those with the most probability by full
        attention: the share that was attended. Heads that share a selection share the probability.
    """

    calls: int
    audited_calls: int
    queries: int
    kept_mass: float | None
    kept_mass_min: float | None
    output_error: float | None
    output_error_max: float | None
    page_recall: float | None


def read_audit(totals: Tensor) -> Audit:
    """Waits for the device."""
    values = dict(zip(TOTALS, totals.tolist(), strict=True))
    queries = int(values["queries"])

    def mean(name: str) -> float | None:
        return values[name] / queries if queries else None

    return Audit(
        calls=int(values["calls"]),
        audited_calls=int(values["audited_calls"]),
        queries=queries,
        kept_mass=mean("kept_mass"),
        kept_mass_min=1 - values["lost_mass_max"] if queries else None,
        output_error=mean("output_error"),
        output_error_max=values["output_error_max"] if queries else None,
        page_recall=mean("page_recall"),
    )
