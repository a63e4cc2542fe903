"""Measure one workload end to end: every method decodes one token per round."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile.bench.decode.decoder import (
    Place,
    compare_logits,
    num_equal_tokens,
    relative_distance,
)
from quest_compile.bench.decode.llama_cpp_decoder import llama_decoders_of
from quest_compile.bench.decode.methods import check_memory, decoder_of, names_of
from quest_compile.bench.decode.models import weight_bytes
from quest_compile.bench.ops.checks import check_kernels
from quest_compile.bench.ops.measure import sample_fields
from quest_compile.bench.progress import Progress, say
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.rounds import Rounds, Samples, measure_rounds
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import ModelShape

_READ_BYTES = 256 * 2**20
_MORE_GRAPHS = 64


def measure(
    title: str,
    model: Any,
    settings: list[Setting],
    place: Place,
    wanted: list[str] | None,
    rounds: Rounds,
    recorder: Recorder,
    shape: ModelShape | None = None,
) -> tuple[list[Result], Samples]:
    """Results of all methods that passed their checks; ``recorder`` hears of the others.

    ``shape``: what ``model`` was made from, for llama.cpp.

    Raises:
        RefusedError: plain torch would serve, or no method is left.
    """
    device = str(model.device.type)
    kernels = check_kernels(device)
    # Every method is another graph of the same code, and torch runs what is over its limit eagerly.
    torch._dynamo.config.recompile_limit = _MORE_GRAPHS
    torch._dynamo.reset()
    check_memory(model, settings, place, wanted)
    decoders = _made(model, settings, place, wanted, shape)
    decoders = _prepared(title, decoders, "reduce-overhead" if device == "cuda" else None, recorder)
    if not decoders:
        raise RefusedError("no method is left")
    data = torch.ones(_READ_BYTES // 4, device=device)
    samplers: dict[str, Any] = {"read_loop": lambda _: _seconds_of_read(data)}
    samplers |= {decoder.name: decoder.sample for decoder in decoders}
    samples = measure_rounds(samplers, rounds, title)
    bandwidth = _READ_BYTES / samples.median("read_loop")
    common = {
        "context": place.context,
        "batch": place.batch,
        "threads": torch.get_num_threads(),
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        **kernels,
        "model_bytes": weight_bytes(model),
        **sample_fields(samples),
    }
    facts = {"bytes_moved": _READ_BYTES, "bytes_per_second": bandwidth}
    results = [Result(title, "read_loop", samples.values["read_loop"], common | facts)]
    for decoder in decoders:
        try:
            facts = decoder.facts()
        except RefusedError as error:
            recorder.refuse(title, error)
            continue
        if decoders[0].name.startswith("dense") and decoder.tokens:
            facts["tokens_as_dense"] = num_equal_tokens(decoder.tokens, decoders[0].tokens)
        seconds = samples.median(decoder.name)
        say(f"{title}: {decoder.name}, {1e3 * seconds:.3g} ms a step")
        rate = facts["bytes_moved"] / seconds
        facts |= {"bytes_per_second": rate, "fraction_of_read_loop": rate / bandwidth}
        results.append(Result(title, decoder.name, samples.values[decoder.name], common | facts))
    return results, samples


def _made(
    model: Any,
    settings: list[Setting],
    place: Place,
    wanted: list[str] | None,
    shape: ModelShape | None,
) -> list[Any]:
    """A decoder per method."""
    names = names_of(settings, wanted)
    decoders: list[Any] = []
    with Progress("filling caches", len(names), "method") as progress:
        for name in names:
            progress.doing(name)
            decoders.append(decoder_of(name, model, settings, place))
            progress.update()
        if model.device.type == "cpu":
            progress.doing("writing a model for llama.cpp")
            decoders += llama_decoders_of(shape, place, wanted)
    return decoders


def _prepared(title: str, decoders: list[Any], mode: str | None, recorder: Recorder) -> list[Any]:
    """Compiled and checked; dense methods must agree on the logits of the first step."""
    ready: list[Any] = []
    dense_logits = None
    with Progress("checking and compiling", len(decoders), "method") as progress:
        for decoder in decoders:
            try:
                logits = _prepare(decoder, mode, dense_logits, progress.doing)
            except RefusedError as error:
                recorder.refuse(title, error)
            else:
                if dense_logits is None and decoder.name.startswith("dense"):
                    dense_logits = logits
                ready.append(decoder)
            progress.update()
            progress.done(decoder.name)
    return ready


def _prepare(
    decoder: Any,
    mode: str | None,
    dense_logits: torch.Tensor | None,
    doing: Callable[[str], None],
) -> torch.Tensor | None:
    """The logits of the first step; ``dense_logits``: those of the first dense method, if any."""
    start = time.perf_counter()
    logits = decoder.prepare(mode, doing)
    is_dense = decoder.name.startswith("dense")
    dense_logits = logits if dense_logits is None and is_dense else dense_logits
    if dense_logits is not None and logits is not None:
        distance = relative_distance(logits, dense_logits)
        decoder.metadata["logits_distance_to_dense"] = distance
    if is_dense:
        compare_logits(decoder.name, logits, dense_logits)
    decoder.metadata["check_and_compile_seconds"] = time.perf_counter() - start
    if mode:
        decoder.metadata["mode"] = mode
    return logits


def _seconds_of_read(data: torch.Tensor) -> float:
    start = time.perf_counter()
    data.sum().item()
    return time.perf_counter() - start
