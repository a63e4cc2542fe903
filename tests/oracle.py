"""The one tolerance rule: at most twice the error of plain torch in the same dtype.

Both errors are measured against the reference in float64. A few units in the last place of the
output dtype are granted on top: plain torch is exact now and then.
"""

import torch

_GRANTED_ULPS = 2


def assert_as_accurate_as(plain, actual, exact):
    """``actual`` is as close to ``exact`` (float64) as ``plain``, which has the dtype of actual."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert actual.dtype == plain.dtype
    actual, plain, exact = (x.detach().cpu() for x in (actual, plain, exact))
    is_finite = exact.isfinite()
    assert torch.equal(actual[~is_finite].double(), exact[~is_finite]), "not finite elsewhere"
    assert actual[is_finite].isfinite().all(), "not finite where the exact result is"
    if not is_finite.any():
        return
    exact, size = exact[is_finite], exact[is_finite].abs().max()
    error = (actual[is_finite].double() - exact).abs().max()
    plain_error = (plain[is_finite].double() - exact).abs().max()
    budget = 2 * plain_error + _GRANTED_ULPS * torch.finfo(actual.dtype).eps * size
    assert error <= budget, f"error {error:.3g}, plain torch {plain_error:.3g}, budget {budget:.3g}"


def in_float64(function, *args, **kwargs):
    """``function`` with every floating point tensor among its arguments as float64."""
    return function(*(_double(x) for x in args), **kwargs)


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
