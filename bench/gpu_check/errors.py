"""How far a result is from the right one."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value; infinite where other values are not finite."""
    actual, expected = actual.float(), expected.float()
    finite = expected.isfinite()
    same = actual.isfinite() == finite
    if not bool(same.all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    size = expected[finite].abs().max().clamp(min=1e-6)
    return float((actual[finite] - expected[finite]).abs().max() / size)
