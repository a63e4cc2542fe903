"""Find the linear layers of a graph on a CPU, and why some are left to torch. Changes nothing."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from quest_compile.ops.limits import DTYPES, IN_FEATURES_MULTIPLE, MAX_LINEAR_ROWS
from quest_compile.passes.graph import argument_of, example_value, is_plain_tensor, memory_of
from quest_compile.passes.reasons import LinearReason

_aten = torch.ops.aten
_PARAMETERS = ("input", "weight", "bias")
_LINEAR = frozenset({torch.nn.functional.linear, _aten.linear.default})
# Of a row with the transposed weight.
_PRODUCTS = frozenset(
    {torch.matmul, operator.matmul, torch.mm, _aten.matmul.default, _aten.mm.default}
)
_ADDED_PRODUCTS = frozenset({torch.addmm, _aten.addmm.default})


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A call that multiplies with a weight that comes into the graph.

    ``is_transposed``: ``weight`` is [in_features, out_features].
    ``reason``: why it is left as it is; None if quest::linear_decode can take its place.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    is_transposed: bool
    reason: LinearReason | None


def match_linear(graph: fx.Graph) -> Iterator[LinearLayer]:
    """In the order of the graph."""
    for node in graph.nodes:
        found = _arguments(node)
        if found is None or not all(isinstance(x, fx.Node) for x in found[:2]):
            continue
        x, weight, bias = found
        value = example_value(weight)
        if memory_of(weight).op not in ("placeholder", "get_attr") or not _is_cpu_matrix(value):
            continue
        is_transposed = node.target not in _LINEAR
        reason = _why_not(node, x, value.t() if is_transposed else value, bias)
        yield LinearLayer(node, x, weight, bias, is_transposed, reason)


def _arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """Input, weight and bias; None if the call is something else."""
    if node.op != "call_function":
        return None
    if node.target in _LINEAR:
        return tuple(argument_of(node, i, name) for i, name in enumerate(_PARAMETERS))
    if node.kwargs:
        return None
    if node.target in _PRODUCTS and len(node.args) == 2:
        return (*node.args, None)
    if node.target in _ADDED_PRODUCTS and len(node.args) == 3:
        return (*node.args[1:], node.args[0])
    return None


def _is_cpu_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.device.type == "cpu"


def _why_not(node: fx.Node, x: Any, weight: torch.Tensor, bias: Any) -> LinearReason | None:
    """``weight``: [out_features, in_features]."""
    tensors = [example_value(x), weight, *([] if bias is None else [example_value(bias)])]
    if not all(map(is_plain_tensor, tensors)):
        return LinearReason.TENSOR_SUBCLASS
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return LinearReason.GRADIENTS
    dtypes = {tensor.dtype for tensor in (*tensors, example_value(node))}
    if len(dtypes) > 1 or weight.dtype not in DTYPES:
        return LinearReason.DTYPE
    is_whole = guard_or_false(weight.shape[1] % IN_FEATURES_MULTIPLE == 0)
    if not (is_whole and guard_or_false(weight.stride(1) == 1) and _is_bias(tensors[2:], weight)):
        return LinearReason.LAYOUT
    # A symbolic number becomes a guard: one graph for few rows, one for many.
    num_rows = math.prod(tensors[0].shape[:-1])
    if not (guard_or_false(num_rows <= MAX_LINEAR_ROWS) and guard_or_false(num_rows >= 1)):
        return LinearReason.MANY_ROWS
    return None


def _is_bias(given: list[torch.Tensor], weight: torch.Tensor) -> bool:
    return all(x.ndim == 1 and bool(guard_or_false(x.shape[0] == weight.shape[0])) for x in given)
