"""Which function a graph is of, and which functions torch compiles no further."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext

# Number of a function -> when a call of it needed a graph over the limit, in ns.
_given_up: dict[int, int] = {}
# Of torch's records of compilations the newest that was looked at.
_newest: Any = None

# The outermost line of a stack trace.
_FRAME = r'File "(?:[^"]*[/\\])?(?P<file>[^"]+)", line \d+, in (?P<function>\S+)'


@dataclasses.dataclass(frozen=True)
class CompiledFunction:
    """``name``: as ``forward (modeling_llama.py)``; ``frame``: torch's number of it, None outside
    of a compilation; ``time``: when the graph was compiled, in ns, as torch may count anew."""

    name: str
    frame: int | None
    time: int


def function_of(gm: fx.GraphModule) -> CompiledFunction:
    """Of the graph that is being compiled."""
    from torch._dynamo.callback import callback_handler

    if _note_given_up not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(_note_given_up)
    traces = (node.meta.get("stack_trace") or "" for node in gm.graph.nodes)
    lines = filter(None, (re.search(_FRAME, trace) for trace in traces))
    frame = next(lines, None)
    name = f"{frame['function']} ({frame['file']})" if frame else "a function"
    compile_id = CompileContext.current_compile_id()
    return CompiledFunction(name, compile_id.frame_id if compile_id else None, time.time_ns())


def is_full(function: CompiledFunction, num_graphs: int) -> bool:
    """Would one graph more be over torch's limit?"""
    return function.frame is not None and num_graphs >= torch._dynamo.config.recompile_limit


def is_given_up(function: CompiledFunction) -> bool:
    """Did a call need a graph over the limit? What fits no graph runs as it is from then on."""
    _note_given_up()
    return function.frame is not None and _given_up.get(function.frame, 0) > function.time


def _note_given_up(*ended: Any) -> None:
    """Torch remembers its last 64 compilations: look whenever one ends, and when asked."""
    # Brings Dynamo and Triton, which a graph has brought already and importing this does not.
    from torch._dynamo.utils import get_compilation_metrics

    global _newest
    records = get_compilation_metrics()
    if not records or records[-1] is _newest:
        return
    _newest = records[-1]
    for record in records:
        frame = re.fullmatch(r"(\d+)/\d+", record.compile_id or "")
        if frame and "limit exceeded" in (record.fail_reason or ""):
            _given_up[int(frame[1])] = 1000 * (record.start_time_us or 0)
