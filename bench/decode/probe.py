"""One method in a process of its own: what compilation and memory cost from a fresh start."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import time
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.decode.methods import compilation_of
from quest_compile.bench.decode.models import cache_bytes, filled_cache, random_model, weight_bytes
from quest_compile.bench.ops.inputs import Setting
from quest_compile.bench.results import RefusedError
from quest_compile.bench.shapes import DTYPES, SHAPES
from quest_compile.decoding import greedy_step

_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Probe:
    """``cache_folder``: of Inductor's compiled code, None for its usual one."""

    method: str
    shape: str
    dtype: str
    layers: int | None
    context: int
    batch: int
    threads: int
    device: str
    settings: tuple[Setting, ...]
    cache_folder: str | None = None


def run_probe(probe: Probe) -> dict[str, float]:
    """Seconds and bytes of a fresh process.

    Raises:
        RefusedError: the process failed, or nothing was replaced.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    variable, before = "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if probe.cache_folder:
        os.environ[variable] = probe.cache_folder
    process = spawn.Process(target=_serve, args=(theirs, probe))
    try:
        process.start()
        theirs.close()
        answer = ours.recv()
    except EOFError:
        answer = "it ended"
    finally:
        if probe.cache_folder:
            os.environ.pop(variable)
            if before is not None:
                os.environ[variable] = before
        process.join()
    if isinstance(answer, str):
        raise RefusedError(f"the process of {probe.method}: {answer}")
    return answer


def _serve(pipe: Any, probe: Probe) -> None:
    try:
        pipe.send(_measure(probe))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _measure(probe: Probe) -> dict[str, float]:
    torch.set_num_threads(probe.threads)
    model = random_model(SHAPES[probe.shape], DTYPES[probe.dtype], probe.device, probe.layers)
    model, backend, config, _ = compilation_of(probe.method, model, list(probe.settings))
    cache = filled_cache(model, probe.context, probe.context + 2 * _STEPS, probe.batch)
    filled = _peak_bytes(probe.device)
    _forget_peak(probe.device)
    token = torch.zeros(probe.batch, 1, dtype=torch.int64, device=probe.device)
    compiled = torch.compile(model, backend=backend)
    ops.reset_counters()
    seconds = []
    with torch.no_grad():
        for i in range(_STEPS):
            start = time.perf_counter()
            token = greedy_step(compiled, cache, token, probe.context + i).clone()
            token.tolist()
            seconds.append(time.perf_counter() - start)
    found = {
        "first_token": seconds[0],
        "second_token": seconds[1],
        "cache": cache_bytes(cache),
        "weights": weight_bytes(model),
        "peak": _peak_bytes(probe.device),
        "peak_before_decoding": filled,
    }
    if config is None:
        return found
    report = backend.report()
    if not any(row.attention.startswith("quest::") for row in report.rows):
        raise RefusedError("no layer was replaced")
    found["passes"] = sum(graph.rewrite_seconds for graph in report.graphs)
    found["sparse_layers"] = report.count("sparse")
    found["sparse_calls"] = ops.counters()["sparse_calls"]
    # How many a context just within the budget has, depends on the step.
    if probe.context >= config.budget and found["sparse_calls"] != _STEPS * found["sparse_layers"]:
        raise RefusedError(f"{found['sparse_calls']} sparse calls in {_STEPS} steps")
    found["page_summaries"] = _summary_bytes(cache)
    return found


def _summary_bytes(cache: Any) -> int:
    """Of the states that hang on the key caches (see ``quest_compile.state``)."""
    states = [getattr(layer.keys, "_quest_page_summaries", None) for layer in cache.layers]
    kept = [state for by_layout in states if by_layout for state in by_layout.values()]
    return sum(tensor.nbytes for state in kept for tensor in state.tensors())


def _forget_peak(device: str) -> None:
    """From here on: making the model takes more than decoding with it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
