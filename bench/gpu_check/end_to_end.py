"""A model with random weights decodes greedily: dense compiled with CUDA graphs, and with Quest."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import quest_compile
from quest_compile import ops
from quest_compile.bench.decode.counts import decode_graph
from quest_compile.bench.decode.models import (
    cache_bytes,
    filled_cache,
    random_model,
    weight_bytes,
    with_enable_gqa,
)
from quest_compile.bench.gpu_check.record import Record, StepFailedError
from quest_compile.bench.shapes import SHAPES
from quest_compile.decoding import greedy_step, rewind

# Steps before the clock starts; then so many between two looks at it, as often.
_WARM_UP, _STEPS, _ROUNDS = 5, 8, 5


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One batch of rows with ``context`` tokens behind them; ``num_layers`` None: all."""

    shape: str
    context: int
    batch: int
    num_layers: int | None = None
    budget: int = 2048
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        layers = self.num_layers or SHAPES[self.shape].num_layers
        return f"{self.shape}, {layers} layers, {self.context} x{self.batch}"


def run_end_to_end(record: Record, device: str, decodings: list[Decoding]) -> None:
    """Milliseconds per step; the model is made once per shape and number of layers."""
    model: Any = None
    made: tuple[str, int | None] | None = None
    inactive = []
    for decoding in decodings:
        if record.seconds_left() < 20:
            record.add(workload=decoding.name, skipped=f"{record.seconds_left():.0f} s left")
            continue
        if made != (decoding.shape, decoding.num_layers):
            model, made = None, (decoding.shape, decoding.num_layers)
            model = random_model(SHAPES[decoding.shape], decoding.dtype, device, made[1])
        try:
            cache = filled_cache(model, decoding.context, decoding.context + 64, decoding.batch)
        except torch.OutOfMemoryError as error:
            record.add(workload=decoding.name, skipped=f"memory: {error}"[:80])
            continue
        inactive += _compare(record, decoding, model, cache, device)
        del cache
    if inactive:
        raise StepFailedError("; ".join(inactive)[:400])


def _compare(record: Record, decoding: Decoding, model: Any, cache: Any, device: str) -> list[str]:
    """A row per method; returns what was not as it should be."""
    sizes = {"weights": weight_bytes(model), "cache": cache_bytes(cache)}
    record.add(workload=decoding.name, **{f"{k}_GB": v / 1e9 for k, v in sizes.items()})
    inactive: list[str] = []
    seconds: dict[str, float] = {}
    slowest = 0.0
    for method, (twin, make) in _methods(model, decoding, device).items():
        # The slowest so far, its compilation included, and some.
        if record.seconds_left() < 10 + slowest:
            record.add(workload=decoding.name, method=method, skipped="no time left")
            continue
        start = time.monotonic()
        torch._dynamo.reset()
        _reset_counters()
        try:
            found = _time(make(twin), cache, decoding, device)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            record.add(workload=decoding.name, method=method, refused=text)
            inactive.append(f"{method}: {text}")
            continue
        slowest = max(slowest, time.monotonic() - start)
        seconds[method] = found.pop("seconds")
        record.add(
            workload=decoding.name, method=method, ms_per_step=1e3 * seconds[method],
            tokens_per_s=decoding.batch / seconds[method], **found
        )  # fmt: skip
        expects_sparse = method == "quest" and decoding.context > decoding.budget
        if expects_sparse and not found["sparse_calls"]:
            inactive.append(f"{decoding.name}: Quest was not active")
    dense = {method: s for method, s in seconds.items() if method.startswith("dense")}
    if dense and "quest" in seconds:
        best = min(dense, key=lambda method: dense[method])
        ratio = dense[best] / seconds["quest"]
        record.add(workload=decoding.name, best_dense=best, best_dense_over_quest=ratio)
    return inactive


def _methods(
    model: Any, decoding: Decoding, device: str
) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Quest first, then the best dense peer; the form transformers uses by itself last."""
    inner = "inductor" if device == "cuda" else "eager"
    mode = "reduce-overhead" if device == "cuda" else None

    def quest(twin: Any) -> Any:
        return torch.compile(
            twin, backend=quest_compile.backend(budget=decoding.budget, inner=inner), mode=mode
        )

    def own_dense(twin: Any) -> Any:
        num_layers = len(list(twin.model.layers))
        backend = quest_compile.backend(num_dense_layers=num_layers, inner=inner)
        return torch.compile(twin, backend=backend, mode=mode)

    def dense(twin: Any) -> Any:
        if device == "cpu":
            return torch.compile(twin, backend="eager")
        return torch.compile(twin, mode=mode)

    return {
        "quest": (model, quest),
        "dense, quest::dense_decode": (model, own_dense),
        "dense, enable_gqa": (with_enable_gqa(model), dense),
        "dense, repeat_kv": (model, dense),
    }


def _time(step: Callable[..., Any], cache: Any, decoding: Decoding, device: str) -> dict[str, Any]:
    """Median seconds of a step, and what the compilers counted after the warm-up."""
    start = time.perf_counter()
    token = torch.zeros(decoding.batch, 1, dtype=torch.int64, device=device)
    rewind(cache, decoding.context)
    with torch.no_grad():
        for i in range(_WARM_UP):
            token = greedy_step(step, cache, token.clone(), decoding.context + i)
        _synchronize(device)
        compile_seconds = time.perf_counter() - start
        recorded = num_recorded(device)
        ops.reset_counters()
        times = []
        position = decoding.context + _WARM_UP
        num_steps, num_rounds = (_STEPS, _ROUNDS) if device == "cuda" else (1, 3)
        for _ in range(num_rounds):
            begin = time.perf_counter()
            for _ in range(num_steps):
                token = greedy_step(step, cache, token.clone(), position)
                position += 1
            _synchronize(device)
            times.append((time.perf_counter() - begin) / num_steps)
    counted = torch._dynamo.utils.counters["inductor"]
    return {
        "seconds": statistics.median(times),
        "compile_s": round(compile_seconds, 1),
        "sparse_calls": _sparse_calls(device, num_steps * num_rounds),
        "cudagraph_skips": counted["cudagraph_skips"],
        "recorded_after_warm_up": num_recorded(device) - recorded,
        "last_token": int(token[0, 0]),
    }


def _sparse_calls(device: str, num_steps: int) -> int:
    """In a replayed graph no operator is called: there, calls of the rewritten graphs."""
    counted = ops.counters()["sparse_calls"]
    if counted or device == "cpu":
        return counted
    graph = decode_graph(quest_compile.report())
    return graph.count("sparse") * num_steps if graph else 0


def num_recorded(device: str) -> int:
    """CUDA graphs recorded so far."""
    if device == "cpu":
        return 0
    from torch._inductor.cudagraph_trees import get_container

    manager: Any = get_container(torch.cuda.current_device()).tree_manager
    nodes = [] if manager is None else [n for found in manager.roots.values() for n in found]
    count = 0
    while nodes:
        node = nodes.pop()
        nodes += [child for children in node.children.values() for child in children]
        count += 1
    return count


def _reset_counters() -> None:
    torch._dynamo.utils.counters.clear()
    ops.reset_counters()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
