"""Generation settings of a model that ``compile_for_generate`` has prepared."""

from __future__ import annotations

import copy
from typing import Any

from transformers import CompileConfig, GenerationConfig

_REPLACED = ("cache_implementation", "prefill_chunk_size")


class PreparedGenerationConfig(GenerationConfig):
    """Is saved as it was before it was prepared, and so are its deep copies."""

    # What was replaced, by name.
    _replaced: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        fields.pop("_replaced", None)
        return fields

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        original: Any = copy.deepcopy(self)
        restore(original)
        original.save_pretrained(*args, **kwargs)


def prepare(config: Any, compile_config: CompileConfig, prefill_chunk_size: int | None) -> None:
    """Ask for a static cache and for ``compile_config``, once more where that has been done.

    ``prefill_chunk_size``: for a model whose user asks for none.
    """
    if type(config) is GenerationConfig:
        replaced = {name: getattr(config, name, None) for name in _REPLACED}
        setattr(config, "_replaced", replaced)  # noqa: B010
        config.__class__ = PreparedGenerationConfig
    config.cache_implementation = "static"
    config.prefill_chunk_size = config._replaced["prefill_chunk_size"] or prefill_chunk_size
    config.compile_config = compile_config


def restore(config: Any) -> None:
    """Of a prepared one."""
    for name, value in config._replaced.items():
        setattr(config, name, value)
    config.compile_config = None
    del config._replaced
    config.__class__ = GenerationConfig
