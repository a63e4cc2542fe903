"""The methods of end-to-end decoding, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import quest_compile
from quest_compile.bench.decode.decoder import Decoder, Place
from quest_compile.bench.decode.models import with_enable_gqa
from quest_compile.bench.ops.inputs import Setting
from quest_compile.config import QuestConfig
from quest_compile.inner import inner_compiler

DENSE_METHODS = ("dense_transformers", "dense_enable_gqa", "dense_decode")


def decoders_of(
    model: Any, settings: list[Setting], place: Place, wanted: list[str] | None
) -> list[Decoder]:
    """A decoder per method; dense ones come first, as the others compare to the first."""
    inner = inner_compiler("inductor", [next(model.parameters())])
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    by_name = {setting.name: setting for setting in settings}
    names = [name for name in (*DENSE_METHODS, *by_name) if wanted is None or name in wanted]
    decoders = []
    for name in names:
        config = None
        if name == "dense_decode":
            config = QuestConfig(num_dense_layers=num_layers, inner=inner)
        elif name in by_name:
            config = QuestConfig(**dataclasses.asdict(by_name[name]), inner=inner)
        backend: Any = inner if config is None else quest_compile.backend(**config.as_dict())
        own = with_enable_gqa(model) if name == "dense_enable_gqa" else model
        decoder = Decoder(name, own, backend, place, config)
        decoder.metadata |= {"compiler": inner, "layers": num_layers}
        if name in by_name and config is not None:
            decoder.metadata |= dataclasses.asdict(by_name[name])
            decoder.metadata["num_dense_layers"] = config.num_dense_layers
        decoders.append(decoder)
    return decoders
