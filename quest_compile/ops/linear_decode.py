"""A linear layer of a few rows: what a decode step of a model spends its time in, on CPUs."""

from __future__ import annotations

import math

from torch import Tensor

from quest_compile.ops import limits, reference, require
from quest_compile.ops.counters import count_linear_call
from quest_compile.ops.operator import operator


def _check(x, weight, bias=None):
    require.tensors(x=x, weight=weight)
    require.dtype("x", x, *limits.DTYPES)
    require.rank("weight", weight, 2, "[out_features, in_features]")
    require.dtype("weight", weight, x.dtype)
    require.device("weight", weight, x)
    require.contiguous("weight", weight, 1)
    shape, (out_features, in_features) = list(x.shape), weight.shape
    multiple, most = limits.IN_FEATURES_MULTIPLE, limits.MAX_LINEAR_ROWS
    for condition in (in_features >= multiple, in_features % multiple == 0):
        require.that(
            condition,
            lambda: (
                f"weight: expected in_features that are a multiple of {multiple}, got {in_features}"
            ),
        )
    require.that(x.dim() >= 1, lambda: "x: expected [..., in_features], got shape []")
    require.that(
        x.shape[-1] == in_features,
        lambda: f"x: expected the {in_features} in_features of weight last, got shape {shape}",
    )
    num_rows = math.prod(x.shape[:-1])
    for condition in (num_rows >= 1, num_rows <= most):
        require.that(condition, lambda: f"x: expected from 1 to {most} rows, got shape {shape}")
    if bias is not None:
        require.tensors(bias=bias)
        require.shape("bias", bias, (out_features,), "[out_features]")
        require.dtype("bias", bias, x.dtype)
        require.device("bias", bias, x)


def _reference(x, weight, bias):
    count_linear_call(weight)
    return reference.linear_decode(x, weight, bias)


def _fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_OPERATOR = operator(
    "linear_decode",
    "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    kernels=("cpu",),
)


def linear_decode(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of up to 8 rows, each as if it came alone.

    Products are added in float32. CPUs have a kernel; elsewhere this is plain torch.

    Args:
        x: [..., in_features], from 1 to 8 rows; float32, bfloat16 or float16.
        weight: [out_features, in_features] in the dtype of x, the last dimension contiguous;
            in_features is a multiple of 8.
        bias: [out_features] in the dtype of x.

    Returns:
        [..., out_features] in the dtype of x.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    return _OPERATOR(x, weight, bias)
