"""How a graph reads and writes a KV cache: from an attention operand back to a placeholder."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from quest_compile.passes.graph import (
    aliased_placeholder,
    call_name,
    example_value,
    is_inplace_call,
    same_tensor,
)
from quest_compile.passes.reasons import Reason, Refused

_EVERYTHING = slice(None, None, None)
_IDENTITIES = frozenset({"contiguous", "detach"})
_HEAD_REPEATS = frozenset(
    {"getitem", "unsqueeze", "expand", "reshape", "view", "flatten", "repeat_interleave"}
)
_ALLOCATIONS = frozenset({"zeros", "new_zeros", "zeros_like", "empty", "new_empty", "full"})


def cache_writes(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Every in-place call on (a view of) a placeholder, by placeholder."""
    writes = defaultdict(list)
    for node in nodes:
        if not is_inplace_call(node):
            continue
        for argument in node.all_input_nodes if call_name(node) == "" else node.args[:1]:
            placeholder = aliased_placeholder(argument)
            if placeholder is not None:
                writes[placeholder].append(node)
    return writes


def trace_to_cache(node: Any) -> tuple[fx.Node, int, fx.Node | None]:
    """Walk an attention operand back to a 4-D placeholder.

    Returns the placeholder, how often each KV head is repeated, and the first node of the walk.
    """
    steps: list[fx.Node] = []
    node = same_tensor(node)
    while node.op != "placeholder":
        name = call_name(node)
        if name in _ALLOCATIONS:
            raise Refused(Reason.CACHE_CREATED_IN_GRAPH)
        if name not in _IDENTITIES | _HEAD_REPEATS or len(steps) > 3:
            raise Refused(Reason.NOT_A_CACHE)
        if name not in _IDENTITIES:
            steps.insert(0, node)
        node = same_tensor(node.args[0])
    value = example_value(node)
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        raise Refused(Reason.NOT_A_CACHE)
    return node, _head_repeats(steps, value), steps[0] if steps else None


def _head_repeats(steps: list[fx.Node], cache: torch.Tensor) -> int:
    """How often the known ways of spelling "repeat the KV heads" repeat them."""
    names = [call_name(step) for step in steps]
    first: Any = steps[0].args if steps else ()
    if not names:
        return 1
    if names == ["repeat_interleave"]:
        arguments: dict[str, Any] = dict(zip(("repeats", "dim"), first[1:])) | steps[0].kwargs
        if arguments.get("dim") in (1, -3) and isinstance(arguments.get("repeats"), int):
            return arguments["repeats"]
    if len(names) == 3 and names[1] == "expand" and names[2] in ("reshape", "view", "flatten"):
        expanded, merged = example_value(steps[1]).shape, example_value(steps[2]).shape
        batch, num_kv_heads, max_seq_len, head_dim = cache.shape
        inserts_group_dim = (names[0] == "getitem" and _is_unsqueeze_2(first[1])) or (
            names[0] == "unsqueeze" and first[1:] == (2,)
        )
        if (
            inserts_group_dim
            and tuple(expanded[:2]) == (batch, num_kv_heads)
            and tuple(expanded[3:]) == (max_seq_len, head_dim)
            and tuple(merged) == (batch, num_kv_heads * expanded[2], max_seq_len, head_dim)
        ):
            return int(expanded[2])
    raise Refused(Reason.UNKNOWN_CACHE_READ)


def _is_unsqueeze_2(index: Any) -> bool:
    """``[:, :, None]`` with or without trailing full slices."""
    if not isinstance(index, tuple) or len(index) < 3:
        return False
    return index[2] is None and all(entry == _EVERYTHING for i, entry in enumerate(index) if i != 2)


def single_write(writes: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The one write of new rows at a tensor of positions: (node, positions)."""
    if not writes:
        raise Refused(Reason.NO_CACHE_WRITE)
    if len(writes) > 1:
        raise Refused(Reason.SEVERAL_CACHE_WRITES)
    (write,) = writes
    arguments: Any = write.args
    position: Any = None
    if same_tensor(write.args[0]).op == "placeholder":
        if call_name(write) == "index_copy_" and arguments[1] in (2, -2):
            position = arguments[2]
        elif write.target is operator.setitem:
            position = _position_of_index(arguments[1])
        elif call_name(write) == "index_put_" and not write.kwargs and len(arguments) == 3:
            position = _position_of_index(tuple(arguments[1]))
    value = example_value(position)
    if not isinstance(value, torch.Tensor) or value.ndim != 1 or value.dtype != torch.int64:
        raise Refused(Reason.UNKNOWN_CACHE_WRITE)
    return write, position


def _position_of_index(index: Any) -> Any:
    """``position`` of ``cache[:, :, position]``."""
    if isinstance(index, tuple) and len(index) in (3, 4):
        others = index[:2] + index[3:]
        if all(entry == _EVERYTHING or entry is None for entry in others[:2]) and all(
            entry in (_EVERYTHING, Ellipsis) for entry in others[2:]
        ):
            return index[2]
    return None
