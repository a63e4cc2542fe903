"""Is the loss of a method no higher than that of dense, on the same tokens?"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from quest_compile.eval.statistics import INCONCLUSIVE, Comparison, judge

_MIN_RUNS = 20
_NUM_RESAMPLES = 4000


def compare_losses(differences: Sequence[Sequence[float]], margin: float) -> Comparison:
    """Losses per token, method minus dense in nats, in runs of neighbouring tokens.

    Neighbours are not independent, so runs are resampled, not tokens (percentile bootstrap). With
    fewer than 20 runs there is no verdict. ``margin`` is what the mean may grow by. In the result
    ``lost`` and ``gained`` count tokens that got worse and better, samples are tokens.

    Raises:
        ValueError: no tokens.
    """
    tokens = [d for run in differences for d in run]
    if not tokens:
        raise ValueError("differences must hold at least one token")
    mean = sum(tokens) / len(tokens)
    sums = [(sum(run), len(run)) for run in differences]
    rng = random.Random(0)
    means = []
    for _ in range(_NUM_RESAMPLES):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(s for s, _ in drawn) / sum(n for _, n in drawn))
    means.sort()
    low, high = means[round(0.025 * _NUM_RESAMPLES)], means[round(0.975 * _NUM_RESAMPLES) - 1]

    def interval(num_samples: float) -> tuple[float, float]:
        """Of minus the loss: more is better, as for scores."""
        shrink = math.sqrt(len(tokens) / num_samples)
        return -(mean + (high - mean) * shrink), -(mean - (mean - low) * shrink)

    verdict, needed = judge(interval, len(tokens), margin)
    if len(sums) < _MIN_RUNS:
        least = math.ceil(len(tokens) * _MIN_RUNS / len(sums))
        verdict, needed = INCONCLUSIVE, max(least, needed or 0)
    return Comparison(
        num_samples=len(tokens),
        dense=0.0,
        method=mean,
        lost=float(sum(d > 0 for d in tokens)),
        gained=float(sum(d < 0 for d in tokens)),
        difference=mean,
        low=low,
        high=high,
        design_effect=1.0,
        verdict=verdict,
        num_needed=needed,
    )
