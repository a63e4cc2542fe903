"""The safe way into ``model.generate`` of transformers."""

from __future__ import annotations

from typing import Any, TypeVar

from quest_compile.backend import backend

Model = TypeVar("Model")


def compile_for_generate(model: Model, **config: Any) -> Model:
    """Make ``model.generate`` decode with Quest; returns the same model.

    ``torch.compile(model).generate(...)`` compiles nothing: the method belongs to the model inside
    and calls it uncompiled. Here the model's own generation settings ask for a static cache and for
    our backend, on every device. Prefill stays eager; every decode step is compiled.

    Args:
        model: a transformers model with ``generate``.
        **config: as for :func:`quest_compile.backend`; ``quest_compile.backend(**config).report()``
            says what was replaced.

    Raises:
        TypeError: the model has no generation settings.
    """
    from transformers import CompileConfig

    generation_config = getattr(model, "generation_config", None)
    if generation_config is None or not hasattr(model, "generate"):
        raise TypeError(
            f"model must be a transformers model with generate(), got {type(model).__name__}"
        )
    compile_config: Any = CompileConfig(backend=backend(**config), fullgraph=False)
    compile_config._compile_all_devices = True
    generation_config.cache_implementation = "static"
    generation_config.compile_config = compile_config
    return model
