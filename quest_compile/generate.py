"""The safe way into ``model.generate`` of transformers."""

from __future__ import annotations

import json
import warnings
from typing import Any, TypeVar

from typing_extensions import Unpack

from quest_compile import ops
from quest_compile.backend import QuestBackend, QuestStrictError, backend
from quest_compile.config import QuestSettings, takes_settings
from quest_compile.dense_causes import causes_in_model

Model = TypeVar("Model")
# transformers compiles a prefill only where it is asked for chunks.
_PREFILL_CHUNK = 4096


@takes_settings
def compile_for_generate(model: Model, **settings: Unpack[QuestSettings]) -> Model:
    """Make ``model.generate`` decode with Quest; returns the same model.

    ``torch.compile(model).generate(...)`` compiles nothing: the method belongs to the model inside
    and calls it uncompiled. Here the model's own generation settings ask for a static cache and for
    our backend, on every device. Every decode step is compiled. Prefill stays eager, but with
    ``prefill="dense"``, where our kernel serves the device: then prompts go through the compiled
    model, too, in chunks of 4096 tokens (or the ``prefill_chunk_size`` that the user has set).
    ``quest_compile.warmup(model, max_cache_len)`` compiles it before the first request;
    :func:`restore` undoes it, and ``save_pretrained`` saves nothing of it.

    Args:
        model: a transformers model with ``generate``.

    The settings are those of :func:`quest_compile.backend`; called with the same ones, its
    ``report()`` says what was replaced.

    Raises:
        TypeError: the model has no generation settings.
        TypeError, ValueError: a setting has the wrong type or value, or an unknown name.
        QuestStrictError: ``strict``, and something in the model keeps ``generate`` dense.
    """
    generation_config = _generation_config_of(model)
    made = backend(**settings)
    from quest_compile import prepared_config, prepared_model

    module = _module_that_generates(model)
    for cause in causes_in_model(module):
        text = f"the model cannot decode sparsely: {cause.value}"
        if made.config.strict:
            raise QuestStrictError(f"strict=True: {text}")
        warnings.warn(f"{text}; decoding stays dense", stacklevel=2)
    chunk = _PREFILL_CHUNK if _compiles_prefill(module, made) else None
    prepared_config.prepare(generation_config, _compile_config(made), chunk)
    prepared_model.prepare(module, made)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`compile_for_generate`; returns the same model, which decodes as it did before.

    What the model was compiled to is given back. A model that was not prepared stays as it is.

    Raises:
        TypeError: the model has no generation settings.
    """
    generation_config = _generation_config_of(model)
    from quest_compile import prepared_config, prepared_model

    prepared_config.restore(generation_config)
    prepared_model.restore(_module_that_generates(model))
    return model


def _compiles_prefill(model: Any, made: QuestBackend) -> bool:
    device = getattr(model, "device", None)
    if made.config.prefill != "dense" or device is None:
        return False
    return ops.has_prefill_kernel(device.type)


def _module_that_generates(model: Any) -> Any:
    """PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _generation_config_of(model: Any) -> Any:
    generation_config = getattr(model, "generation_config", None)
    if generation_config is None or not hasattr(model, "generate"):
        raise TypeError(
            f"model must be a transformers model with generate(), got {type(model).__name__}"
        )
    return generation_config


def _compile_config(made: QuestBackend) -> Any:
    """By name where the settings are such that the generation settings can be printed and saved as
    JSON, which transformers does unasked; a function of the layer for a budget is not."""
    from transformers import CompileConfig

    options = made.changed_settings()
    try:
        is_json = json.loads(json.dumps(options)) == options
    except TypeError:
        is_json = False
    if is_json:
        # torch.compile takes options or a mode. Without a mode a step is a CUDA graph, too.
        config: Any = CompileConfig(backend="quest", mode=None, options=options)  # type: ignore[arg-type]
    else:
        config = CompileConfig(backend=made)
    config._compile_all_devices = True
    return config
