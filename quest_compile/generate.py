"""The safe way into ``model.generate`` of transformers."""

from __future__ import annotations

import json
import warnings
from typing import Any, TypeVar

from typing_extensions import Unpack

from quest_compile.backend import QuestBackend, backend
from quest_compile.config import QuestSettings, takes_settings

Model = TypeVar("Model")


@takes_settings
def compile_for_generate(model: Model, **settings: Unpack[QuestSettings]) -> Model:
    """Make ``model.generate`` decode with Quest; returns the same model.

    ``torch.compile(model).generate(...)`` compiles nothing: the method belongs to the model inside
    and calls it uncompiled. Here the model's own generation settings ask for a static cache and for
    our backend, on every device. Prefill stays eager; every decode step is compiled.
    ``quest_compile.warmup(model, max_cache_len)`` compiles it before the first request;
    :func:`restore` undoes it, and ``save_pretrained`` saves nothing of it.

    Args:
        model: a transformers model with ``generate``.

    The settings are those of :func:`quest_compile.backend`; called with the same ones, its
    ``report()`` says what was replaced.

    Raises:
        TypeError: the model has no generation settings.
        TypeError, ValueError: a setting has the wrong type or value, or an unknown name.
    """
    generation_config = _generation_config_of(model)
    made = backend(**settings)
    from quest_compile.prepared_config import prepare

    prepare(generation_config, _compile_config(made))
    _warn_if_not_sdpa(model)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`compile_for_generate`; returns the same model, which decodes as it did before.

    What the model was compiled to is given back. A model that was not prepared stays as it is.

    Raises:
        TypeError: the model has no generation settings.
    """
    generation_config = _generation_config_of(model)
    from quest_compile.prepared_config import PreparedGenerationConfig
    from quest_compile.prepared_config import restore as restore_config

    if isinstance(generation_config, PreparedGenerationConfig):
        restore_config(generation_config)
        for name in ("_compiled_call", "_last_compile_config"):
            vars(model).pop(name, None)
    return model


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


def _warn_if_not_sdpa(model: Any) -> None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa"):
        warnings.warn(
            f"the model was loaded with attn_implementation={attention!r}, where nothing is "
            'replaced: decoding stays dense. Load it with attn_implementation="sdpa", or call '
            'model.set_attn_implementation("sdpa").',
            stacklevel=3,
        )
