"""llama.cpp decoding a model of the same shape with random float16 weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quest_compile.bench.decode.decoder import Place
from quest_compile.bench.llama_cpp.gguf_file import write_gguf
from quest_compile.bench.llama_cpp.session import LlamaModel, LlamaSession, is_installed
from quest_compile.bench.shapes import ModelShape

METHODS = {"llama_cpp": False, "llama_cpp_flash": True}


class LlamaDecoder:
    """A method beside those of ``decoder``; its output is not compared: it has other weights."""

    def __init__(self, name: str, model: LlamaModel, shape: ModelShape, place: Place) -> None:
        self.name = name
        self.tokens: list[list[int]] = []
        self.metadata: dict[str, Any] = {
            "llama_cpp_python": model.version,
            "cache_dtype": "float16",
            "weight_dtype": "float16",
            "layers": shape.num_layers,
        }
        self._model, self._shape, self._place = model, shape, place

    def prepare(self, mode: str | None, doing: Callable[[str], None]) -> torch.Tensor | None:
        doing(f"{self.name}: filling its cache")
        self._session = LlamaSession(
            self._model,
            self._place.context,
            flash_attention=METHODS[self.name],
            threads=torch.get_num_threads(),
            spare=self._place.capacity - self._place.context,
        )
        return None

    def sample(self, number: int) -> float:
        if self._session.num_tokens >= self._place.capacity:
            self._session.rewind(self._place.context)
        return self._session.step()

    def facts(self) -> dict[str, Any]:
        shape, layer = self._shape, self._shape.layer
        kv_bytes = shape.num_layers * layer.cache_bytes(self._place.context, torch.float16)
        weight_bytes = 2 * num_weights(shape)
        return self.metadata | {
            "tokens_read_per_query": float(self._place.context),
            "kv_bytes_per_step": kv_bytes,
            "weight_bytes": weight_bytes,
            "bytes_moved": kv_bytes + weight_bytes,
        }


def num_weights(shape: ModelShape) -> int:
    """Weights that a step reads: layers and head."""
    hidden, layer = shape.hidden_size, shape.layer
    attention = 2 * hidden * layer.head_dim * (layer.num_q_heads + layer.num_kv_heads)
    each = attention + 3 * hidden * shape.intermediate_size
    return shape.num_layers * each + shape.vocab_size * hidden


def llama_decoders_of(
    shape: ModelShape | None, place: Place, wanted: list[str] | None
) -> list[LlamaDecoder]:
    """Where llama.cpp is installed and has such a model: with and without flash attention.

    Raises:
        ImportError: wanted by name and not installed.
    """
    names = [name for name in METHODS if wanted is None or name in wanted]
    if wanted is not None and names and not is_installed():
        raise ImportError("llama.cpp: pip install 'quest-compile[llama-cpp]'")
    if not names or not is_installed() or shape is None or place.batch != 1:
        return []
    if shape.family != "llama":
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, shape)
        # The file stays mapped after it is removed.
        model = LlamaModel(path)
    return [LlamaDecoder(name, model, shape, place) for name in names]
