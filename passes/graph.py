"""What every pass needs to ask a Dynamo graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

# In-place tensor methods whose result is their first argument.
RETURNS_SELF = frozenset({"index_copy_", "index_put_", "scatter_", "copy_", "fill_", "zero_"})

# Methods and functions that may give a view of, or the same tensor as, their first argument.
VIEWS = frozenset(
    "getitem getattr view view_as reshape expand expand_as unsqueeze squeeze flatten unflatten "
    "transpose permute swapaxes narrow select detach contiguous to alias t mT T".split()
)


def call_name(node: fx.Node) -> str:
    """``"reshape"`` for ``x.reshape(...)`` and ``torch.reshape(x, ...)``; ``""`` if no call."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return getattr(node.target, "__name__", "")
    return ""


def example_value(node: Any) -> Any:
    """The fake tensor (or SymInt) Dynamo recorded for a node; None where there is none."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def is_inplace_call(node: fx.Node) -> bool:
    """Does this call write its first argument?"""
    name = call_name(node)
    if name == "setitem":
        return True
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def same_size(a: Any, b: Any) -> bool:
    """Are two sizes equal? Of symbolic ones the answer becomes a guard."""
    return bool(guard_or_false(a == b))


def same_tensor(node: Any) -> Any:
    """Walk back over in-place calls to the tensor they wrote and returned."""
    while isinstance(node, fx.Node) and call_name(node) in RETURNS_SELF and node.args:
        node = node.args[0]
    return node


def argument_of(node: fx.Node, index: int, name: str) -> Any:
    """An argument of a call, however it was passed; None where it was not."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def memory_of(node: Any) -> Any:
    """The node whose memory this node may be a view of; itself if it made its own."""
    while isinstance(node, fx.Node) and node.args and isinstance(node.args[0], fx.Node):
        name = call_name(node)
        if name not in VIEWS and not is_inplace_call(node):
            break
        node = node.args[0]
    return node


def is_written(node: fx.Node) -> bool:
    """Does any in-place call of the graph write the memory of this node?"""
    return next(_writes(node), None) is not None


def _writes(node: fx.Node) -> Iterator[fx.Node]:
    """In-place calls of the graph on the memory of this node."""
    aliases = [memory_of(node)]
    seen = set(aliases)
    while aliases:
        alias = aliases.pop()
        for user in alias.users:
            if not user.args or user.args[0] is not alias or user in seen:
                continue
            if is_inplace_call(user):
                yield user
            if call_name(user) in VIEWS or is_inplace_call(user):
                seen.add(user)
                aliases.append(user)


def is_written_between(
    node: fx.Node, first: fx.Node, last: fx.Node, order: dict[fx.Node, int]
) -> bool:
    """Does any in-place call from ``first`` to ``last`` write the memory of this node?"""
    return any(order[first] < order[call] < order[last] for call in _writes(node))


def erase_dead_views(graph: fx.Graph) -> None:
    """Erase views that nothing reads any more (they can only be left over from a rewrite)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (call_name(node) in VIEWS or call_name(node) == "repeat_interleave"):
            graph.erase_node(node)


def copy_graph(gm: fx.GraphModule) -> fx.Graph:
    """A copy of Dynamo's graph, with all that later stages look up on its nodes.

    Dynamo walks the placeholders of its own graph after the backend returns, so that one must never
    be edited.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, val_map={}))
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), graph.find_nodes(op="placeholder")):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    return graph


def module_of(graph: fx.Graph, original: fx.GraphModule) -> fx.GraphModule:
    """The graph module of an edited copy of ``original``'s graph."""
    gm = fx.GraphModule(original, graph)
    gm.meta = dict(original.meta)
    if hasattr(original, "_param_name_to_source"):
        gm._param_name_to_source = original._param_name_to_source
    return gm


def source_line(node: fx.Node) -> str:
    """``file.py:123`` of the user code that made this call; empty when not recorded."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    parts = frames[-1].split('"')
    number = frames[-1].split("line ")[-1].split(",")[0]
    return f"{parts[1].rsplit('/', 1)[-1]}:{number}"


def is_plain_tensor(value: Any) -> bool:
    """A fake of an ordinary tensor: no DTensor, no other wrapper subclass."""
    if not isinstance(value, torch.Tensor):
        return False
    return type(value).__module__.startswith("torch._subclasses.fake") or type(value) in (
        torch.Tensor,
        torch.nn.Parameter,
    )
