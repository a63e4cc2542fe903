"""The safe way into ``model.generate`` of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from typing_extensions import Never

from quest_compile.backend import backend
from quest_compile.budgets import Budget

Model = TypeVar("Model")


def compile_for_generate(
    model: Model,
    *,
    budget: Budget = 2048,
    page_size: int = 16,
    num_dense_layers: int = 2,
    num_sink_pages: int = 1,
    num_recent_pages: int = 2,
    max_q_len: int = 8,
    group_reduce: str = "sum",
    summary: str = "minmax",
    sketch_bits: int = 1,
    top_p: float = 1.0,
    audit: int = 0,
    inner: str = "inductor",
    strict: bool = False,
    inductor_options: Mapping[str, Any] | None = None,
    **unknown: Never,
) -> Model:
    """Make ``model.generate`` decode with Quest; returns the same model.

    ``torch.compile(model).generate(...)`` compiles nothing: the method belongs to the model inside
    and calls it uncompiled. Here the model's own generation settings ask for a static cache and for
    our backend, on every device. Prefill stays eager; every decode step is compiled.
    ``quest_compile.warmup(model, max_cache_len)`` compiles it before the first request.

    Args:
        model: a transformers model with ``generate``.

    The settings are those of :func:`quest_compile.backend`; called with the same ones, its
    ``report()`` says what was replaced.

    Raises:
        TypeError: the model has no generation settings.
        TypeError, ValueError: a setting has the wrong type or value, or an unknown name.
    """
    settings = locals()
    settings |= settings.pop("unknown")
    del settings["model"]

    from transformers import CompileConfig

    generation_config = getattr(model, "generation_config", None)
    if generation_config is None or not hasattr(model, "generate"):
        raise TypeError(
            f"model must be a transformers model with generate(), got {type(model).__name__}"
        )
    compile_config: Any = CompileConfig(backend=backend(**settings), fullgraph=False)
    compile_config._compile_all_devices = True
    generation_config.cache_implementation = "static"
    generation_config.compile_config = compile_config
    _warn_if_not_sdpa(model)
    return model


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
