"""Measure one workload end to end: every method decodes one token per round."""

from __future__ import annotations

import time
from typing import Any

import torch

from quest_compile.bench.decode.decoder import (
    Decoder,
    Place,
    compare_logits,
    num_equal_tokens,
)
from quest_compile.bench.decode.methods import decoders_of
from quest_compile.bench.decode.models import weight_bytes
from quest_compile.bench.ops.checks import check_kernels
from quest_compile.bench.ops.inputs import Setting
from quest_compile.bench.ops.measure import sample_fields
from quest_compile.bench.results import Recorder, RefusedError, Result
from quest_compile.bench.rounds import Rounds, Samples, measure_rounds

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
) -> tuple[list[Result], Samples]:
    """Results of all methods that passed their checks; ``recorder`` hears of the others.

    Raises:
        RefusedError: plain torch would serve, or no method is left.
    """
    device = str(model.device.type)
    kernels = check_kernels(device)
    # Every method is another graph of the same code, and torch runs what is over its limit eagerly.
    torch._dynamo.config.recompile_limit = _MORE_GRAPHS
    torch._dynamo.reset()
    decoders = _prepared(title, model, settings, place, wanted, recorder)
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
        "kernels": kernels,
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
        if decoders[0].name.startswith("dense"):
            facts["tokens_as_dense"] = num_equal_tokens(decoder, decoders[0])
        rate = facts["bytes_moved"] / samples.median(decoder.name)
        facts |= {"bytes_per_second": rate, "fraction_of_read_loop": rate / bandwidth}
        results.append(Result(title, decoder.name, samples.values[decoder.name], common | facts))
    return results, samples


def _prepared(
    title: str,
    model: Any,
    settings: list[Setting],
    place: Place,
    wanted: list[str] | None,
    recorder: Recorder,
) -> list[Decoder]:
    """Compiled and checked; dense methods must agree on the logits of the first step."""
    from tqdm import tqdm

    _check_memory(model, settings, place, wanted)
    decoders = decoders_of(model, settings, place, wanted)
    ready = []
    dense_logits = None
    for decoder in (bar := tqdm(decoders, desc="checking and compiling", unit="method")):
        bar.set_postfix_str(decoder.name)
        start = time.perf_counter()
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        try:
            logits = decoder.prepare(mode)
            if dense_logits is None:
                dense_logits = logits
            is_dense = decoder.name.startswith("dense")
            distance = ((logits - dense_logits).norm() / dense_logits.norm()).item()
            if is_dense:
                compare_logits(decoder.name, logits, dense_logits)
        except RefusedError as error:
            recorder.refuse(title, error)
            continue
        if decoders[0].name.startswith("dense"):
            decoder.metadata["logits_distance_to_dense"] = distance
        decoder.metadata["check_and_compile_seconds"] = time.perf_counter() - start
        if mode:
            decoder.metadata["mode"] = mode
        ready.append(decoder)
    return ready


def _check_memory(
    model: Any, settings: list[Setting], place: Place, wanted: list[str] | None
) -> None:
    """Every method has a cache of its own.

    Raises:
        ValueError: they do not fit.
    """
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    token_bytes = 2 * config.num_key_value_heads * head_dim * model.dtype.itemsize
    num_methods = len(wanted) if wanted is not None else 3 + len(settings)
    # Page summaries are an eighth of the keys; the largest temporary is a layer's repeated cache.
    needed = int(1.1 * num_methods * place.batch * place.capacity * token_bytes)
    needed *= config.num_hidden_layers
    free = _free_bytes(model.device)
    if free is not None and needed > free:
        raise ValueError(
            f"{num_methods} methods need {needed / 2**30:.1f} GiB for their caches of "
            f"{place.capacity} tokens, {free / 2**30:.1f} GiB are free: name fewer in --methods, "
            "or a smaller --batch or --contexts"
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _seconds_of_read(data: torch.Tensor) -> float:
    start = time.perf_counter()
    data.sum().item()
    return time.perf_counter() - start
