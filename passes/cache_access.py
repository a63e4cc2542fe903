"""How a graph reads and writes a KV cache: from an attention operand back to a placeholder.

Nothing is guessed: a cache that is used in any way that is not listed here is left alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from quest_compile.passes.graph import (
    RETURNS_SELF,
    VIEWS,
    argument_of,
    call_name,
    example_value,
    is_inplace_call,
    is_written,
    same_tensor,
)
from quest_compile.passes.reasons import Reason, Refused

_EVERYTHING = slice(None, None, None)
_IDENTITIES = frozenset({"contiguous", "detach"})
_HEAD_REPEATS = frozenset(
    {"getitem", "unsqueeze", "expand", "reshape", "view", "flatten", "repeat_interleave"}
)
_ALLOCATIONS = frozenset({"zeros", "new_zeros", "zeros_like", "empty", "new_empty", "full"})
_WRITES = frozenset({"index_copy_", "index_put_", "setitem"})
# What may be done with a cache besides writing it and taking views: reads without side effects.
_READS = frozenset(
    "scaled_dot_product_attention repeat_interleave size dim stride numel is_contiguous".split()
)
# Arithmetic on positions that keeps "the next positions" what they are.
_POSITION_STEPS = frozenset(
    "arange add sub getitem view reshape unsqueeze squeeze expand to long int contiguous "
    "clone".split()
)


def trace_to_cache(node: Any) -> tuple[fx.Node, int, fx.Node | None]:
    """Walk an attention operand back to a 4-D placeholder.

    Returns the placeholder, how often each KV head is repeated, and the first node of the walk.
    """
    steps: list[fx.Node] = []
    first: fx.Node | None = None
    node = same_tensor(node)
    while node.op != "placeholder":
        is_identity = _is_identity(node)
        known = is_identity or call_name(node) in _HEAD_REPEATS
        if not known or len(steps) > 3 or not node.args or not isinstance(node.args[0], fx.Node):
            raise Refused(_why_no_cache(node))
        if not is_identity:
            steps.insert(0, node)
        first = node
        node = same_tensor(node.args[0])
    value = example_value(node)
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        raise Refused(Reason.NOT_A_CACHE)
    return node, _head_repeats(steps, value), first


def skip_head_repeats(node: Any) -> tuple[fx.Node, int, fx.Node | None]:
    """Walk an attention operand back over the repetition of its heads, if there is one.

    Returns the operand before, how often each head is repeated, and the first node of the walk.
    """
    steps: list[fx.Node] = []
    operand = same_tensor(node)
    while call_name(operand) in _HEAD_REPEATS or _is_identity(operand):
        if not operand.args or not isinstance(operand.args[0], fx.Node):
            break
        steps.insert(0, operand)
        operand = same_tensor(operand.args[0])
        value = example_value(operand)
        names = [step for step in steps if not _is_identity(step)]
        if names and isinstance(value, torch.Tensor) and value.ndim == 4:
            try:
                return operand, _head_repeats(names, value), steps[0]
            except Refused:
                if len(names) > 2:
                    break
    return same_tensor(node), 1, None


def _is_identity(node: fx.Node) -> bool:
    """Same values, dtype and device as its first argument, whether a view or a copy."""
    if call_name(node) == "to" and node.args:
        old, new = example_value(node.args[0]), example_value(node)
        tensors = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
        return tensors and (old.dtype, old.device) == (new.dtype, new.device)
    return call_name(node) in _IDENTITIES


def _why_no_cache(node: fx.Node) -> Reason:
    """The reason for an operand whose walk ends at a node that is no placeholder."""
    if call_name(node) in _ALLOCATIONS and _gains_rows(node):
        return Reason.CACHE_CREATED_IN_GRAPH
    while node.args and isinstance(node.args[0], fx.Node):
        node = same_tensor(node.args[0])
    is_cache = node.op == "placeholder" and _gains_rows(node)
    return Reason.COMPUTED_FROM_CACHE if is_cache else Reason.NOT_A_CACHE


def _gains_rows(node: fx.Node) -> bool:
    return any(user.args[:1] == (node,) and _position_written(user) for user in node.users)


def _head_repeats(steps: list[fx.Node], cache: torch.Tensor) -> int:
    """How often the known ways of spelling "repeat the KV heads" repeat them."""
    names = [call_name(step) for step in steps]
    if not names:
        return 1
    if names == ["repeat_interleave"]:
        repeats, dim = argument_of(steps[0], 1, "repeats"), argument_of(steps[0], 2, "dim")
        if dim in (1, -3) and isinstance(repeats, int):
            return repeats
    if len(names) == 3 and names[1] == "expand" and names[2] in ("reshape", "view", "flatten"):
        expanded, merged = example_value(steps[1]).shape, example_value(steps[2]).shape
        batch, num_kv_heads, max_seq_len, head_dim = cache.shape
        inserts_group_dim = (
            names[0] == "getitem" and _is_unsqueeze_2(argument_of(steps[0], 1, "index"))
        ) or (names[0] == "unsqueeze" and argument_of(steps[0], 1, "dim") == 2)
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


def single_write(cache: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The one write of new rows to this placeholder: (node, positions)."""
    writes = _writes_of(cache)
    if not writes:
        raise Refused(Reason.NO_CACHE_WRITE)
    if len(writes) > 1:
        raise Refused(Reason.SEVERAL_CACHE_WRITES)
    (write,) = writes
    position: Any = None
    if same_tensor(argument_of(write, 0, "self")) is cache:
        position = _position_written(write)
    value = example_value(position)
    if not isinstance(value, torch.Tensor) or value.ndim != 1:
        raise Refused(Reason.UNKNOWN_CACHE_WRITE)
    if value.dtype not in (torch.int64, torch.int32) or not _counts_on(position):
        raise Refused(Reason.UNKNOWN_POSITION)
    return write, position


def _position_written(write: fx.Node) -> Any:
    """The index tensor of a write of whole rows to dimension 2 of a cache; None for other calls."""
    if call_name(write) == "index_copy_" and argument_of(write, 1, "dim") in (2, -2):
        return argument_of(write, 2, "index")
    if write.target is operator.setitem:
        return _position_of_index(write.args[1], everything=(_EVERYTHING,))
    if call_name(write) == "index_put_" and not argument_of(write, 3, "accumulate"):
        return _position_of_index(tuple(argument_of(write, 1, "indices")), everything=(None,))
    return None


def _writes_of(cache: fx.Node) -> list[fx.Node]:
    """Every write to the memory of this placeholder; refuses what it does not know."""
    writes: list[fx.Node] = []
    unknown: set[Reason] = set()
    aliases, seen = [cache], {cache}
    while aliases:
        alias = aliases.pop()
        for user in alias.users:
            name = call_name(user)
            is_first_argument = bool(user.args) and user.args[0] is alias
            if user in seen or user.op == "output":
                continue
            if name in _WRITES and is_first_argument:
                writes.append(user)
            elif not (is_first_argument and name in VIEWS) and name not in _READS:
                is_write = is_first_argument and is_inplace_call(user)
                unknown.add(Reason.UNKNOWN_CACHE_WRITE if is_write else Reason.UNKNOWN_CACHE_USE)
            seen.add(user)
            if name in VIEWS or name in RETURNS_SELF:
                aliases.append(user)
    for reason in (Reason.UNKNOWN_CACHE_WRITE, Reason.UNKNOWN_CACHE_USE):
        if reason in unknown:
            raise Refused(reason)
    return writes


def _position_of_index(index: Any, everything: tuple[Any, ...]) -> Any:
    """``position`` of ``cache[:, :, position]``."""
    if isinstance(index, tuple) and len(index) in (3, 4):
        if all(entry in everything for entry in index[:2]) and all(
            entry in (*everything, Ellipsis) for entry in index[3:]
        ):
            return index[2]
    return None


def _counts_on(position: fx.Node) -> bool:
    """Does this follow from an input by counting on? (A rolling buffer takes a remainder.)"""
    if is_written(position):
        return False
    pending, seen = [position], {position}
    while pending:
        node = pending.pop()
        if node.op in ("placeholder", "get_attr"):
            continue
        if call_name(node) not in _POSITION_STEPS:
            return False
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending += new
    return True
