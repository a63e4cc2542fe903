"""What a fresh process measures of one method: its first steps, its memory, and what it did."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import resource
import time
from typing import Any

import torch

from quest_compile.bench.decode.counts import StepCounts, decode_graph
from quest_compile.bench.decode.decoder import (
    compare_logits,
    num_equal_tokens,
    relative_distance,
)
from quest_compile.bench.decode.methods import DENSE_METHODS, compilation_of, setting_facts
from quest_compile.bench.decode.models import (
    cache_bytes,
    filled_cache,
    own_model,
    page_summary_bytes,
    random_model,
    weight_bytes,
)
from quest_compile.bench.results import RefusedError
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import SHAPES
from quest_compile.decoding import rewind, step_inputs

_STEPS = 5
# What the cache has room for behind the context.
SPARE = 2 * _STEPS


@dataclasses.dataclass(frozen=True)
class Probe:
    """One method in a process of its own.

    ``model``: a folder or hub name, None for random weights of ``shape``; ``cache_folder``: of
    Inductor's compiled code, None for its usual one; ``inner``: what compiles.
    """

    method: str
    shape: str
    dtype: str
    layers: int | None
    context: int
    batch: int
    threads: int
    device: str
    settings: tuple[Setting, ...]
    model: str | None = None
    cache_folder: str | None = None
    inner: str = "inductor"


@dataclasses.dataclass
class Found:
    """``values``: seconds and bytes by name; ``facts``: metadata of results."""

    values: dict[str, float]
    facts: dict[str, Any]


def measure_fresh(probe: Probe) -> Found:
    """To be called once, by a process that has decoded nothing yet.

    Raises:
        RefusedError: nothing was replaced, or the logits are wrong.
    """
    torch.set_num_threads(probe.threads)
    dtype = getattr(torch, probe.dtype)
    if probe.model:
        model = own_model(probe.model, dtype, probe.device)
    else:
        model = random_model(SHAPES[probe.shape], dtype, probe.device, probe.layers)
    settings = list(probe.settings)
    own, backend, config, inner = compilation_of(probe.method, model, settings, probe.inner)
    cache = filled_cache(own, probe.context, probe.context + SPARE, probe.batch)
    filled = _peak_bytes(probe.device)
    _forget_peak(probe.device)
    counts = StepCounts(own, cache, backend, config)
    steps = _decode(torch.compile(own, backend=backend), cache, probe, counts)
    values = {
        "first_token": steps.seconds[0],
        "second_token": steps.seconds[1],
        "cache": cache_bytes(cache),
        "weights": weight_bytes(model),
        "peak": _peak_bytes(probe.device),
        "peak_before_decoding": filled,
    }
    facts: dict[str, Any] = {"compiler": inner, "steps": _STEPS}
    if config is not None:
        facts |= _replaced(probe, backend, counts) | setting_facts(probe.method, config)
        values["passes"] = sum(graph.rewrite_seconds for graph in backend.report().graphs)
        values["page_summaries"] = sum(map(page_summary_bytes, cache.layers))
    facts |= counts.facts() | {"weight_bytes": weight_bytes(model)}
    # The model as it is, uncompiled, from the same keys.
    dense = _decode(model, cache, probe)
    if not counts.total["sparse_calls"]:
        compare_logits(probe.method, steps.logits, dense.logits)
    facts["logits_distance_to_dense"] = relative_distance(steps.logits, dense.logits)
    facts["tokens_as_dense"] = num_equal_tokens(steps.tokens, dense.tokens)
    facts["digest"] = hashlib.sha256(str(steps.tokens).encode()).hexdigest()[:16]
    return Found(values, facts)


@dataclasses.dataclass
class _Steps:
    """``logits`` [B, vocab] of the first step; per step ``tokens`` [B] and ``seconds``."""

    logits: torch.Tensor
    tokens: list[list[int]]
    seconds: list[float]


def _decode(step: Any, cache: Any, probe: Probe, counts: StepCounts | None = None) -> _Steps:
    rewind(cache, probe.context)
    token = torch.zeros(probe.batch, 1, dtype=torch.int64, device=probe.device)
    logits: list[torch.Tensor] = []
    tokens, seconds = [], []
    with torch.no_grad():
        for position in range(probe.context, probe.context + _STEPS):
            if counts:
                counts.begin()
            start = time.perf_counter()
            last = step(**step_inputs(cache, token, position)).logits[:, -1:]
            token = last.argmax(-1)
            tokens.append(token.flatten().tolist())
            seconds.append(time.perf_counter() - start)
            if counts:
                counts.end(position + 1)
            logits = logits or [last[:, 0].float().clone()]
    return _Steps(logits[0], tokens, seconds)


def _replaced(probe: Probe, backend: Any, counts: StepCounts) -> dict[str, int]:
    graph = decode_graph(backend.report())
    rows = graph.rows if graph else ()
    replaced = sum(row.attention.startswith("quest::") for row in rows)
    if not replaced:
        raise RefusedError("no layer was replaced")
    sparse_layers = graph.count("sparse") if graph else 0
    if not sparse_layers and counts.steps_to_be_sparse and probe.method not in DENSE_METHODS:
        raise RefusedError("no layer is sparse")
    counts.check(probe.method, sparse_layers)
    found = {"layers": len(rows), "replaced_layers": replaced, "sparse_layers": sparse_layers}
    return found | {"sparse_calls": counts.total["sparse_calls"]}


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
