"""Compile everything that decoding needs before the first request comes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch

from quest_compile.backend import QuestBackend, quest, report
from quest_compile.progress import progress_bar
from quest_compile.report import Report

# The second step shows Dynamo what changes from step to step; with CUDA graphs, the second warms up
# and the third records.
_NUM_STEPS = 3


def warmup(
    model: Any,
    max_cache_len: int,
    *,
    batch_sizes: int | Iterable[int] = 1,
    call: Callable[[torch.Tensor, Any], Any] | None = None,
    progress: bool = True,
) -> Report:
    """Compile all that decode steps with a static cache of ``max_cache_len`` positions need.

    A few tokens are decoded per batch size, on a cache of that length that is freed afterwards.
    Prefill is eager with ``compile_for_generate`` and needs no warm-up.

    Args:
        model: a model prepared by ``compile_for_generate``: ``generate`` calls of up to
            ``max_cache_len`` tokens, prompt included, then compile nothing (transformers keeps
            using caches of this length). Or a transformers model compiled with
            ``torch.compile(model, backend=...)`` or ``model.compile(backend=...)``.
        max_cache_len: positions of the cache, prompt and new tokens together.
        batch_sizes: one or several; the second one makes the batch size dynamic.
        call: for compiled models, how your loop calls the model for ``tokens`` [B, 1] and a cache,
            as every way of passing arguments is compiled for itself; by default
            ``model(tokens, past_key_values=cache)`` and, where transformers knows that name, from
            5.24 on, ``model(tokens, cache=cache)``. Gradients are off, as they must be; inference
            mode is as it is around ``warmup``.
        progress: show on stderr how far it is, by a bar if that is a terminal.

    Returns:
        The report of the model's backend; ``print`` it.

    Raises:
        TypeError, ValueError: ``model`` is not compiled by Quest, or another argument is wrong.
    """
    batches = _check_sizes(max_cache_len, batch_sizes)
    backend, uses_generate = _backend_of(model)
    if uses_generate and call is not None:
        raise ValueError("call: generate() calls this model itself; leave it out")
    total, title = len(batches) * _NUM_STEPS, "quest_compile: warm-up"
    with progress_bar(total, "step", title, is_shown=progress) as bar, torch.no_grad():
        for batch in batches:
            bar.doing(f"batch size {batch}")
            if uses_generate:
                _generate(model, batch, max_cache_len, bar)
            else:
                _decode(model, batch, max_cache_len, call, bar)
    return backend.report() if isinstance(backend, QuestBackend) else report()


def _check_sizes(max_cache_len: Any, batch_sizes: Any) -> list[int]:
    if not _is_int(max_cache_len):
        raise TypeError(f"max_cache_len must be an int, got {max_cache_len!r}")
    if max_cache_len <= _NUM_STEPS:
        raise ValueError(f"max_cache_len must be more than {_NUM_STEPS}, got {max_cache_len}")
    batches = [batch_sizes] if _is_int(batch_sizes) else batch_sizes
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise TypeError(f"batch_sizes must be an int or several, got {batch_sizes!r}")
    batches = list(dict.fromkeys(batches))
    if not batches or not all(_is_int(batch) and batch > 0 for batch in batches):
        raise ValueError(f"batch_sizes must be positive ints, got {batch_sizes!r}")
    return batches


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _backend_of(model: Any) -> tuple[Any, bool]:
    """(the model's backend, None where torch does not tell; whether ``generate`` compiles it)."""
    compiled = isinstance(model, torch._dynamo.OptimizedModule)
    if compiled or getattr(model, "_compiled_call_impl", None) is not None:
        backend = _backend_of_compiled(model) if compiled else None
        if backend not in (None, quest) and not isinstance(backend, QuestBackend):
            name = getattr(backend, "__name__", repr(backend))
            raise TypeError(f"model is compiled, but with {name}, not quest_compile.backend(...)")
        if getattr(model, "config", None) is None:
            raise TypeError(
                f"model must be a transformers model, got {type(_module_of(model)).__name__}; "
                "to warm up another one, call it a few times"
            )
        return backend, False
    generation_config = getattr(model, "generation_config", None)
    backend = getattr(getattr(generation_config, "compile_config", None), "backend", None)
    if backend == "quest" or isinstance(backend, QuestBackend):
        return backend, True
    raise TypeError(
        f"model ({type(model).__name__}) is not compiled by Quest: call "
        "quest_compile.compile_for_generate(model, ...) before, or pass "
        "torch.compile(model, backend=quest_compile.backend(...))"
    )


def _backend_of_compiled(model: Any) -> Any:
    callback = getattr(model.dynamo_ctx, "callback", None)
    while (inner := getattr(callback, "_torchdynamo_orig_backend", None)) is not None:
        callback = inner
    if isinstance(callback, torch._TorchCompileInductorWrapper):
        return "inductor"
    return getattr(callback, "compiler_fn", None)


def _module_of(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _generate(model: Any, batch: int, max_cache_len: int, bar: Any) -> None:
    """A ``generate`` call that makes a cache of this length and stops after a few tokens."""
    config = copy.deepcopy(model.generation_config)
    # The cache has one position less than max_length, as the last token is not fed again.
    config.update(
        max_length=max_cache_len + 1,
        max_new_tokens=None,
        min_length=None,
        min_new_tokens=None,
        eos_token_id=None,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
    )
    num_tokens = 0

    def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_tokens
        # The first token comes from the prefill.
        bar.update(int(num_tokens > 0))
        num_tokens += 1
        return torch.full_like(input_ids[:, 0], num_tokens > _NUM_STEPS, dtype=torch.bool)

    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=config,
        stopping_criteria=[stop],
    )


def _decode(
    model: Any, batch: int, max_cache_len: int, call: Callable[..., Any] | None, bar: Any
) -> None:
    """Decode steps on a static cache, after an eager prefill of one token."""
    from transformers import StaticCache

    from quest_compile.decoding import cache_names, rewind, step_inputs

    module = _module_of(model)
    device = next(module.parameters()).device
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    cache = StaticCache(config=module.config, max_cache_len=max_cache_len)
    module.forward(**step_inputs(cache, tokens, position=0))
    names = cache_names() if call is None else ("",)
    for name in names:
        rewind(cache, 1)
        for _ in range(_NUM_STEPS):
            if call is None:
                model(tokens, **{name: cache})
            else:
                call(tokens, cache)
            bar.update(1 / len(names))
