"""Time a call: as CUDA graphs over several copies of its inputs, or with a clock on a CPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_REPLAYS = 20
_MAX_SECONDS = 2.0


def median_seconds(call: Callable[[Any], Any], copies: Sequence[Any]) -> float:
    """Of one call; ``copies``: of its argument, one after the other."""
    if torch.cuda.is_available() and _is_on_cuda(copies[0]):
        return _cuda_graph_seconds(call, copies)
    return _clock_seconds(call, copies)


def _clock_seconds(call: Callable[[Any], Any], copies: Sequence[Any]) -> float:
    call(copies[0])
    times = []
    for i in range(5):
        start = time.perf_counter()
        call(copies[i % len(copies)])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _cuda_graph_seconds(call: Callable[[Any], Any], copies: Sequence[Any]) -> float:
    """Replays of one graph that holds a call per copy; medians of event times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy in (*copies[:2], copies[0]):
            call(copy)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outs = [call(copy) for copy in copies]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    start_time = time.perf_counter()
    while len(times) < _REPLAYS and (
        len(times) < 5 or time.perf_counter() - start_time < _MAX_SECONDS
    ):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(copies))
    del outs, graph
    return statistics.median(times)


def _is_on_cuda(value: Any) -> bool:
    tensors = [value] if isinstance(value, torch.Tensor) else vars(value).values()
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in tensors)


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy on the device, read and written bytes counted: the best size."""
    sizes = (256 * 2**20, 512 * 2**20) if device == "cuda" else (4 * 2**20,)
    return max(_copy_bandwidth(device, num_bytes) for num_bytes in sizes)


def _copy_bandwidth(device: str, num_bytes: int) -> float:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda x: target.copy_(x), [source] * 4)
    return 2 * source.nbytes / seconds
