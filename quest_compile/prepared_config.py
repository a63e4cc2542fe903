"""Generation settings of a model that ``compile_for_generate`` has prepared have a subclass of
their class, of the same name."""

from __future__ import annotations

import copy
import functools
from typing import Any

from transformers import CompileConfig

from quest_compile.prepared_class import prepared_class

# What is replaced; the value from before is kept under the name with this in front.
_FIELDS = ("cache_implementation", "compile_config", "prefill_chunk_size")
_BEFORE = "_before_quest_"


def prepare(config: Any, compile_config: CompileConfig, prefill_chunk_size: int | None) -> None:
    """Ask for a static cache and for ``compile_config``, once more where that has been done.

    ``prefill_chunk_size``: for a model whose user asks for none.
    """
    if not hasattr(config, "_unprepared_class"):
        for name in _FIELDS:
            setattr(config, _BEFORE + name, getattr(config, name, None))
        base: Any = type(config)
        config.__class__ = _prepared_class(base)
    config.cache_implementation = "static"
    config.prefill_chunk_size = (
        getattr(config, _BEFORE + "prefill_chunk_size") or prefill_chunk_size
    )
    config.compile_config = compile_config


def restore(config: Any) -> None:
    """Undo :func:`prepare`; what was not prepared stays as it is."""
    if not hasattr(config, "_unprepared_class"):
        return
    for name in _FIELDS:
        setattr(config, name, vars(config).pop(_BEFORE + name, None))
    config.__class__ = config._unprepared_class


@functools.cache
def _prepared_class(base: Any) -> Any:
    """Is saved as it was before it was prepared, and so are its deep copies."""

    @functools.wraps(base.to_dict)
    def to_dict(self: Any) -> dict[str, Any]:
        fields = base.to_dict(self)
        return {name: value for name, value in fields.items() if not name.startswith(_BEFORE)}

    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        original = copy.deepcopy(self)
        restore(original)
        original.save_pretrained(*args, **kwargs)

    fields = {"to_dict": to_dict, "save_pretrained": save_pretrained}
    return prepared_class(base, _prepared_class, fields)
