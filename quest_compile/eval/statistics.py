"""Is a method no worse than dense, on the same samples?

Scores lie between 0 and 1. A score of s counts as a right answer with probability s, the same
random number deciding for both methods, so that a pair of scores adds to the four cells of a paired
table: right twice, lost, gained, wrong twice. For scores of 0 and 1 those are counts.

The interval is Newcombe's tenth method for the difference of paired proportions (Statistics in
Medicine 17, 1998): Wilson intervals of both, joined with their correlation. It does not collapse
when no pair differs. Samples that share a context are not independent: all counts are divided by
the design effect, the variance of the mean over contexts against that over samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

Z = 1.959963985  # two-sided 95 %

NO_WORSE = "no worse than dense within the margin"
WORSE = "worse"
INCONCLUSIVE = "inconclusive"

_MOST_SAMPLES = 10**7


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``difference``: method minus dense, with its 95 % interval from ``low`` to ``high``.

    ``lost`` and ``gained``: samples right with dense only, with the method only; sums of the
    differences for scores between 0 and 1. ``num_needed``: samples that would settle the verdict,
    if they come out as these did; None where it is settled.
    """

    num_samples: int
    dense: float
    method: float
    lost: float
    gained: float
    difference: float
    low: float
    high: float
    design_effect: float
    verdict: str
    num_needed: int | None


def compare(
    dense: Sequence[float],
    method: Sequence[float],
    contexts: Sequence[Hashable],
    margin: float,
) -> Comparison:
    """Paired scores, with the context each sample belongs to; ``margin`` is what may be lost.

    Raises:
        ValueError: no samples, different numbers of them, or scores not between 0 and 1.
    """
    if not dense or not len(dense) == len(method) == len(contexts):
        raise ValueError(
            f"dense, method and contexts must be as long, and not empty; got {len(dense)}, "
            f"{len(method)} and {len(contexts)}"
        )
    if not all(0 <= score <= 1 for score in (*dense, *method)):
        raise ValueError("scores must lie between 0 and 1")
    both = sum(map(min, dense, method))
    lost = sum(max(d - m, 0.0) for d, m in zip(dense, method))
    gained = sum(max(m - d, 0.0) for d, m in zip(dense, method))
    neither = len(dense) - both - lost - gained
    effect = design_effect([m - d for d, m in zip(dense, method)], contexts)
    shares = tuple(x / len(dense) for x in (both, lost, gained, neither))

    def interval(num_samples: float) -> tuple[float, float]:
        return paired_interval(*(share * num_samples / effect for share in shares))

    low, high = interval(len(dense))
    verdict, needed = judge(interval, len(dense), margin)
    return Comparison(
        num_samples=len(dense),
        dense=sum(dense) / len(dense),
        method=sum(method) / len(method),
        lost=lost,
        gained=gained,
        difference=(gained - lost) / len(dense),
        low=low,
        high=high,
        design_effect=effect,
        verdict=verdict,
        num_needed=needed,
    )


def paired_interval(both: float, lost: float, gained: float, neither: float) -> tuple[float, float]:
    """95 % interval of (gained - lost) / n; the counts need not be whole."""
    n = both + lost + gained + neither
    dense, method = (both + lost) / n, (both + gained) / n
    dense_low, dense_high = wilson_interval(dense, n)
    method_low, method_high = wilson_interval(method, n)
    product = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    correlation = 0.0
    if product > 0:
        surplus = both * neither - lost * gained
        correlation = (max(surplus - n / 2, 0) if surplus > 0 else surplus) / math.sqrt(product)
    difference = method - dense

    def distance(own: float, other: float) -> float:
        return math.sqrt(max(own**2 - 2 * correlation * own * other + other**2, 0))

    return (
        max(-1.0, difference - distance(method - method_low, dense_high - dense)),
        min(1.0, difference + distance(method_high - method, dense - dense_low)),
    )


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a proportion found in n samples."""
    centre = share + Z**2 / (2 * n)
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def design_effect(differences: Sequence[float], contexts: Sequence[Hashable]) -> float:
    """How many times the variance of the mean exceeds that of independent samples; at least 1."""
    n, mean = len(differences), sum(differences) / len(differences)
    sums: dict[Hashable, float] = {}
    for difference, context in zip(differences, contexts):
        sums[context] = sums.get(context, 0.0) + difference - mean
    independent = sum((d - mean) ** 2 for d in differences) * n / max(n - 1, 1)
    if len(sums) < 2 or independent == 0:
        return 1.0
    clustered = sum(s**2 for s in sums.values()) * len(sums) / (len(sums) - 1)
    return max(1.0, clustered / independent)


def judge(interval, num_samples: int, margin: float) -> tuple[str, int | None]:
    """The verdict, and how many samples it would take if there is none.

    ``interval(n)``: of the difference, were there ``n`` such samples.
    """

    def verdict(n: float) -> str:
        low, high = interval(n)
        if low > -margin:
            return NO_WORSE
        return WORSE if high < 0 else INCONCLUSIVE

    found = verdict(num_samples)
    if found != INCONCLUSIVE:
        return found, None
    low, high = num_samples, 2 * num_samples
    while verdict(high) == INCONCLUSIVE:
        if high > _MOST_SAMPLES:
            return INCONCLUSIVE, _MOST_SAMPLES
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if verdict(middle) == INCONCLUSIVE else (low, middle)
    return INCONCLUSIVE, high
