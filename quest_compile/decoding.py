"""Decode with a transformers model and a static cache, step by step, in any version."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def prefill(
    model: Any,
    tokens: torch.Tensor,
    max_seq_len: int,
    *,
    part: int | None = None,
    on_part: Callable[[int], Any] = lambda num_tokens: None,
    cache: Any = None,
) -> Any:
    """A new StaticCache of ``max_seq_len`` positions, or ``cache``, that holds ``tokens`` [B, T].

    Eager; all at once, or ``part`` tokens after the other; ``on_part`` gets the number of each.
    """
    from transformers import StaticCache

    if cache is None:
        cache = StaticCache(config=model.config, max_cache_len=max_seq_len)
    position = 0
    with torch.no_grad():
        for some in tokens.split(part or tokens.shape[1], dim=1):
            model(**step_inputs(cache, some, position), logits_to_keep=1)
            position += some.shape[1]
            on_part(some.shape[1])
    return cache


def step_inputs(cache: Any, tokens: torch.Tensor, position: int) -> dict[str, Any]:
    """Arguments of ``model(...)`` for ``tokens`` [B, n] at ``position`` of the cache."""
    # A slice of a prompt keeps the prompt's stride, and every new stride would compile once more.
    tokens = tokens.clone(memory_format=torch.contiguous_format)
    inputs = {"input_ids": tokens, cache_names()[0]: cache, "use_cache": True}
    if not _counts_its_tokens(cache):
        end = position + tokens.shape[1]
        inputs["cache_position"] = torch.arange(position, end, device=tokens.device)
    return inputs


@functools.cache
def cache_names() -> tuple[str, ...]:
    """How models take their cache; the last is that of older versions, where it is still taken."""
    import transformers

    # 5.24 renamed it, 5.40 takes the old name no more; unknown names are ignored without a word.
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if version < (5, 24):
        return ("past_key_values",)
    return ("cache", "past_key_values") if version < (5, 40) else ("cache",)


def rewind(cache: Any, length: int) -> None:
    """Make the cache continue at position ``length``; keys and values stay as they are."""
    if hasattr(cache, "rewind"):
        cache.rewind(length)
        return
    for layer in cache.layers:
        if torch.is_tensor(getattr(layer, "cumulative_length", None)):
            layer.cumulative_length.fill_(length)


def greedy_step(
    step: Callable[..., Any], cache: Any, tokens: torch.Tensor, position: int
) -> torch.Tensor:
    """Feed ``tokens`` [B, n] at ``position`` and return the most likely next tokens [B, 1]."""
    logits = step(**step_inputs(cache, tokens, position)).logits
    return logits[:, -1:].argmax(-1)


def _counts_its_tokens(cache: Any) -> bool:
    """transformers 5 keeps the length in the cache; 4 takes ``cache_position`` with each call."""
    return all(hasattr(layer, "cumulative_length") for layer in cache.layers)
