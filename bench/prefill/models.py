"""Time to the first token of a whole model: a prompt into a new static cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.bench.results import RefusedError
from quest_compile.config import QuestConfig
from quest_compile.decoding import step_inputs

METHODS = ("transformers", "dense_transformers", "quest")


def make_samplers(
    model: Any, context: int, batch: int, methods: tuple[str, ...] = METHODS
) -> tuple[dict[str, Callable[[int], float]], dict[str, Any]]:
    """By method: the model as it is, compiled by torch, compiled with our prefill. A cache is used
    again for the next prompt, as a server would. Compiling takes place here.

    Raises:
        RefusedError: our prefill did not run in every layer, or chose another token.
    """
    from transformers import StaticCache

    torch._dynamo.reset()
    backend = QuestBackend(QuestConfig(prefill="dense"))
    calls = {
        "transformers": model,
        "dense_transformers": torch.compile(model),
        "quest": torch.compile(model, backend=backend),
    }
    tokens = torch.randint(0, model.config.vocab_size, (batch, context))
    cache = StaticCache(config=model.config, max_cache_len=context + 64)

    def first_token(name: str) -> torch.Tensor:
        cache.reset()
        with torch.no_grad():
            return calls[name](**step_inputs(cache, tokens, 0), logits_to_keep=1).logits

    first_token("transformers")  # makes the memory of the cache
    before = ops.counters()["prefill_calls"]
    logits = {name: first_token(name) for name in methods}
    num_layers, counted = model.config.num_hidden_layers, ops.counters()["prefill_calls"] - before
    if "quest" in methods and counted != num_layers:
        raise RefusedError(f"quest::dense_prefill ran in {counted} of {num_layers} layers")
    plain = logits.get("transformers")
    if plain is not None:
        for name, found in logits.items():
            error = (found - plain).abs().max() / plain.abs().max()
            if not error < 0.1:
                raise RefusedError(
                    f"{name}: logits differ from those of transformers by {error:.3g}"
                )

    def sampler(name: str) -> Callable[[int], float]:
        def sample(number: int) -> float:
            start = time.perf_counter()
            first_token(name)
            return time.perf_counter() - start

        return sample

    facts = {"layers": num_layers, "prefill_calls": counted}
    return {name: sampler(name) for name in methods}, facts
