"""The methods of end-to-end decoding, by name."""

from __future__ import annotations

from typing import Any

import psutil
import torch

import quest_compile
from quest_compile.bench.decode.decoder import Decoder, Place
from quest_compile.bench.decode.models import with_enable_gqa
from quest_compile.bench.settings import FACTS, Setting
from quest_compile.config import QuestConfig
from quest_compile.inner import inner_compiler

# All tokens through our operators: what runs the linear layers.
_OURS = {"dense_decode_linear_torch": "torch", "dense_decode": "auto"}
DENSE_METHODS = ("dense_transformers", "dense_enable_gqa", *_OURS)


def names_of(settings: list[Setting], wanted: list[str] | None) -> list[str]:
    """Dense methods first, as the others compare to the first."""
    names = [*DENSE_METHODS, *(setting.name for setting in settings)]
    return [name for name in names if wanted is None or name in wanted]


def compilation_of(
    name: str, model: Any, settings: list[Setting], wanted: str = "inductor"
) -> tuple[Any, Any, QuestConfig | None, str]:
    """The model to compile, the backend, its settings (None if nothing is rewritten), and what
    compiles in the end: ``wanted`` where that is possible."""
    inner = inner_compiler(wanted, [next(model.parameters())])
    by_name = {setting.name: setting for setting in settings}
    config = None
    if name in _OURS:
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        config = QuestConfig(num_dense_layers=num_layers, inner=inner, linear=_OURS[name])
    elif name in by_name:
        config = by_name[name].config.replace({"inner": inner})
    backend: Any = inner if config is None else quest_compile.backend(**config.as_dict())
    own = with_enable_gqa(model) if name == "dense_enable_gqa" else model
    return own, backend, config, inner


def decoder_of(name: str, model: Any, settings: list[Setting], place: Place) -> Decoder:
    """The decoder of this method, its cache filled."""
    own, backend, config, inner = compilation_of(name, model, settings)
    decoder = Decoder(name, own, backend, place, config)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder.metadata |= {"compiler": inner, "layers": num_layers} | setting_facts(name, config)
    return decoder


def setting_facts(name: str, config: QuestConfig | None) -> dict[str, Any]:
    """Metadata of a method that is Quest."""
    if config is None or name in DENSE_METHODS:
        return {}
    return {field: getattr(config, field) for field in (*FACTS, "num_dense_layers")}


def check_memory(
    model: Any, settings: list[Setting], place: Place, wanted: list[str] | None
) -> None:
    """Every method has a cache of its own.

    Raises:
        ValueError: they do not fit.
    """
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    token_bytes = 2 * config.num_key_value_heads * head_dim * model.dtype.itemsize
    num_methods = len(wanted) if wanted is not None else len(DENSE_METHODS) + len(settings)
    # Page summaries are an eighth of the keys; the largest temporary is a layer's repeated cache.
    needed = int(1.1 * num_methods * place.batch * place.capacity * token_bytes)
    needed *= config.num_hidden_layers
    free = _free_bytes(model.device)
    if needed > free:
        raise ValueError(
            f"{num_methods} methods need {needed / 2**30:.1f} GiB for their caches of "
            f"{place.capacity} tokens, {free / 2**30:.1f} GiB are free: name fewer in --methods, "
            "or a smaller --batch or --contexts"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
