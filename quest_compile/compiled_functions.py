"""Which function a graph is of, and which functions torch compiles no further."""

from __future__ import annotations

import dataclasses
import re
import time

import torch
from torch import fx
from torch._guards import CompileContext

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
    """Did a call need a graph over the limit? What fits no graph runs as it is from then on.

    Torch remembers its last 64 compilations.
    """
    # Brings Dynamo and Triton, which a graph has brought already and importing this does not.
    from torch._dynamo.utils import get_compilation_metrics

    return any(
        re.fullmatch(rf"{function.frame}/\d+", metrics.compile_id or "")
        and "limit exceeded" in (metrics.fail_reason or "")
        and 1000 * (metrics.start_time_us or 0) > function.time
        for metrics in get_compilation_metrics()
    )
