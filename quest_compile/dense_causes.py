"""Why a ``generate`` call of a prepared model decodes densely, as far as it shows beforehand."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch

from quest_compile.backend import QuestBackend


class DenseCause(enum.Enum):
    """The text says what to do, where something can be done."""

    QUANTIZER = "the quantizer of the model says that it cannot be compiled"
    OFFLOADED = "parts of the model are on disk or in CPU memory (hf_device_map)"
    NO_SDPA = (
        'its attn_implementation is not "sdpa", and nothing else is replaced: load it with '
        'attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")'
    )
    OTHER_SETTINGS = (
        "its generation_config was replaced: call compile_for_generate again, or change single "
        "fields of model.generation_config"
    )
    OTHER_COMPILER = "compile_config names another backend"
    NOT_COMPILED = "disable_compile=True"
    NO_CACHE = "use_cache=False"
    OTHER_CACHE = (
        "the cache is not a static one: leave cache_implementation out, or pass a StaticCache"
    )
    BEAMS = "beam search, which transformers does not compile"
    DRAFTS = (
        "drafts are verified (assisted generation), for which transformers refuses static caches"
    )
    ASSISTANT = (
        "the model makes drafts for another one, for which transformers needs a dynamic cache"
    )
    AUTOCAST = (
        "autocast is on, under which keys and values have two dtypes: load the model with "
        "dtype=torch.bfloat16 instead"
    )
    CUSTOM = "custom_generate did not call the compiled model"


# With these a static cache would fail inside transformers.
NEEDS_DYNAMIC_CACHE = {DenseCause.DRAFTS, DenseCause.ASSISTANT, DenseCause.AUTOCAST}


def causes_in_model(model: Any) -> list[DenseCause]:
    """What in the model itself keeps every call dense."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    quantizer = getattr(model, "hf_quantizer", None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    found = {
        DenseCause.QUANTIZER: not getattr(quantizer, "is_compileable", True),
        DenseCause.OFFLOADED: "disk" in places or ("cpu" in places and len(places) > 1),
        DenseCause.NO_SDPA: getattr(config, "_attn_implementation", None) not in (None, "sdpa"),
    }
    return [cause for cause, is_found in found.items() if is_found]


def causes_in_call(
    model: Any, generation_config: Any, arguments: Mapping[str, Any]
) -> list[DenseCause]:
    """What in the arguments of this ``generate`` call, or around it, keeps it dense."""

    def setting(name: str) -> Any:
        return setting_of_call(name, model, generation_config, arguments)

    if setting("is_assistant"):
        return [DenseCause.ASSISTANT]
    cache = brought_cache(arguments)
    kind = "static" if cache is not None else str(setting("cache_implementation"))
    compiler = setting("compile_config")
    backend = getattr(compiler, "backend", None)
    found = {
        DenseCause.OTHER_SETTINGS: compiler is None,
        DenseCause.OTHER_COMPILER: backend not in (None, "quest")
        and not isinstance(backend, QuestBackend),
        DenseCause.NOT_COMPILED: setting("disable_compile"),
        DenseCause.NO_CACHE: setting("use_cache") is False,
        DenseCause.OTHER_CACHE: "static" not in kind or not getattr(cache, "is_compileable", True),
        DenseCause.BEAMS: (setting("num_beams") or 1) > 1,
        DenseCause.DRAFTS: any(
            setting(name) is not None
            for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        ),
        DenseCause.AUTOCAST: torch.is_autocast_enabled(model.device.type),
    }
    return [cause for cause, is_found in found.items() if is_found]


def setting_of_call(
    name: str, model: Any, generation_config: Any, arguments: Mapping[str, Any]
) -> Any:
    """What ``generate`` takes for this generation setting."""
    if name in arguments:
        return arguments[name]
    given = getattr(generation_config, name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def brought_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments, whatever its name is in this version of transformers."""
    from transformers import Cache

    return next((value for value in arguments.values() if isinstance(value, Cache)), None)
