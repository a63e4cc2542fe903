"""Generation settings of a model that ``compile_for_generate`` has prepared."""

from __future__ import annotations

import copy
from typing import Any

from transformers import CompileConfig, GenerationConfig


class PreparedGenerationConfig(GenerationConfig):
    """Is saved as it was before it was prepared, and so are its deep copies."""

    # What cache_implementation was.
    _replaced_cache: str | None

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        fields.pop("_replaced_cache", None)
        return fields

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        original: Any = copy.deepcopy(self)
        restore(original)
        original.save_pretrained(*args, **kwargs)


def prepare(config: Any, compile_config: CompileConfig) -> None:
    """Ask for a static cache and for ``compile_config``, once more where that has been done."""
    if type(config) is GenerationConfig:
        setattr(config, "_replaced_cache", config.cache_implementation)  # noqa: B010
        config.__class__ = PreparedGenerationConfig
    config.cache_implementation = "static"
    config.compile_config = compile_config


def restore(config: Any) -> None:
    """Of a prepared one."""
    config.cache_implementation = config._replaced_cache
    config.compile_config = None
    del config._replaced_cache
    config.__class__ = GenerationConfig
