"""A model that ``compile_for_generate`` has prepared has a subclass of its class, of the same name.

Its ``generate`` takes caches and modes that transformers refuses there, and says when it is dense.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin

from quest_compile.backend import QuestBackend, QuestStrictError
from quest_compile.context_length import context_length
from quest_compile.dense_causes import (
    NEEDS_DYNAMIC_CACHE,
    DenseCause,
    brought_cache,
    causes_in_call,
    causes_in_model,
    setting_of_call,
)
from quest_compile.prepared_class import prepared_class
from quest_compile.step_state import counted_sparse_steps

# Bound to the model they were made for: no copy of it may have them.
_COMPILED = ("_compiled_call", "_last_compile_config")


def prepare(model: Any, backend: QuestBackend) -> None:
    """Give the model its subclass, once; something else that has a ``generate`` stays as it is."""
    if isinstance(model, GenerationMixin):
        base: Any = type(model)
        if not hasattr(base, "_unprepared_class"):
            model.__class__ = _prepared_class(base)
        vars(model)["_quest_backend"] = backend


def restore(model: Any) -> None:
    """Undo :func:`prepare`; what was compiled is given back."""
    if not hasattr(type(model), "_unprepared_class"):
        return
    model.__class__ = type(model)._unprepared_class
    for name in (*_COMPILED, "_quest_backend"):
        vars(model).pop(name, None)


@functools.cache
def _prepared_class(base: Any) -> Any:
    @functools.wraps(base.generate)
    def generate(
        self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        call = functools.partial(base.generate, self, inputs, generation_config, *args)
        return _generate(self, call, inputs, generation_config, kwargs)

    @functools.wraps(base.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(base.prepare_inputs_for_generation, self, input_ids, *args)
        return _with_its_cache(call, kwargs)

    fields = {
        "generate": generate,
        "prepare_inputs_for_generation": prepare_inputs_for_generation,
    }
    return prepared_class(base, _prepared_class, fields, _without_compiled)


def _without_compiled(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in _COMPILED}


def _generate(
    model: Any, call: Callable[..., Any], inputs: Any, generation_config: Any, kwargs: dict
) -> Any:
    backend: QuestBackend = model._quest_backend
    causes = causes_in_call(model, generation_config, kwargs)
    _say(backend, causes + causes_in_model(model))
    cache = brought_cache(kwargs)
    num_prompt = _prompt_length(inputs, kwargs)
    _say_if_too_long(model, num_prompt)
    if cache is not None:
        _check_length(model, cache, num_prompt, generation_config, kwargs)
    if cache is not None or NEEDS_DYNAMIC_CACHE.intersection(causes):
        kwargs["cache_implementation"] = None
    if backend.config.prefill == "dense" and (causes or not _takes_chunks(model, cache, kwargs)):
        kwargs.setdefault("prefill_chunk_size", None)
    with counted_sparse_steps() as steps:
        out = call(**kwargs)
    if not causes and not steps.count and _num_new_tokens(model, out, inputs, kwargs) > 1:
        if kwargs.get("custom_generate") is not None:
            _say(backend, [DenseCause.CUSTOM])
        elif backend.config.strict:
            raise QuestStrictError(
                f"strict=True: generate() ran without one sparse step\n{backend.report()}"
            )
    return out


# Per token, and cut into chunks by transformers.
_CHUNKED = {"inputs", "input_ids", "attention_mask", "position_ids"}


def _takes_chunks(model: Any, cache: Any, kwargs: dict) -> bool:
    """Chunks of transformers begin at the first token, and leave other tensors whole."""
    others = (value for name, value in kwargs.items() if name not in _CHUNKED)
    is_empty = cache is None or cache.get_seq_length() == 0
    return (
        is_empty and not model.config.is_encoder_decoder and not any(map(torch.is_tensor, others))
    )


def _say(backend: QuestBackend, causes: list[DenseCause]) -> None:
    for cause in causes:
        text = f"generate() decodes densely: {cause.value}"
        if backend.config.strict:
            raise QuestStrictError(f"strict=True: {text}")
        backend.note_dense_generation(cause.value)
        warnings.warn(f"{text} (quest_compile, docs/generate.md)", stacklevel=4)


def _say_if_too_long(model: Any, num_prompt: int) -> None:
    most = context_length(model.config)
    if most is not None and num_prompt > most and not model.config.is_encoder_decoder:
        warnings.warn(
            f"the prompt has {num_prompt} tokens, and the model was made for {most}: expect "
            "nonsense, dense as with Quest (quest_compile)",
            stacklevel=4,
        )


def _check_length(
    model: Any, cache: Any, num_prompt: int, generation_config: Any, kwargs: dict
) -> None:
    """Writing behind the end of a cache stops a GPU for the whole process."""
    sizes = [getattr(x, "max_cache_len", 0) for x in getattr(cache, "layers", ()) if _is_full(x)]
    num_new = setting_of_call("max_new_tokens", model, generation_config, kwargs)
    if num_new is None:
        max_length = setting_of_call("max_length", model, generation_config, kwargs)
        num_new = max((max_length or 0) - num_prompt, 1)
    if not sizes:
        return
    if max(sizes) and num_prompt + num_new - 1 > max(sizes):
        raise ValueError(
            f"the cache passed has {max(sizes)} positions, but {num_prompt} tokens of prompt and "
            f"max_new_tokens={num_new} need {num_prompt + num_new - 1}: make a longer one "
            "(StaticCache(config=model.config, max_cache_len=...)), or ask for fewer tokens"
        )


def _is_full(layer: Any) -> bool:
    return not getattr(layer, "is_sliding", False)


def _prompt_length(inputs: Any, kwargs: dict) -> int:
    """Tokens that the model has seen before the first new one, those in a cache too."""
    mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if isinstance(mask, torch.Tensor):
        return mask.shape[-1]
    return max(_num_ids(inputs, kwargs), 0 if embeds is None else embeds.shape[1])


def _num_ids(inputs: Any, kwargs: dict) -> int:
    """Of those that generate returns in front of the new ones; sounds and images have none."""
    prompt = kwargs.get("input_ids") if inputs is None else inputs
    return 0 if prompt is None or prompt.is_floating_point() else prompt.shape[-1]


def _num_new_tokens(model: Any, out: Any, inputs: Any, kwargs: dict) -> int:
    """What a generate call returned behind its prompt; 0 of another kind of output."""
    num_tokens = getattr(getattr(out, "sequences", out), "shape", (0,))[-1]
    start = 1 if model.config.is_encoder_decoder else _num_ids(inputs, kwargs)
    return num_tokens - start


def _with_its_cache(call: Callable[..., Any], kwargs: dict) -> Any:
    """The inputs of the next call of the model, with the static cache it began with.

    Models with two sets of rotary factors (Phi-3: longrope) leave the cache out where the second
    set comes into force, and would go on with a dynamic one: the cache is filled anew instead.
    """
    inputs = call(**kwargs)
    cache = brought_cache(kwargs)
    if cache is None or any(x is cache for x in inputs.values()) or not cache.is_compileable:
        return inputs
    name = next(name for name, value in kwargs.items() if value is cache)
    if cache.get_seq_length() > 0:
        cache.reset()
        whole = {key: None for key in (name, "next_sequence_length") if key in kwargs}
        inputs = call(**kwargs | whole)
    return inputs | {name: cache}
