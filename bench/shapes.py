"""Model shapes by name, dtypes and lengths as the command line spells them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Layer:
    """The attention shape of one decoder layer."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    def cache_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Keys and values of ``context`` tokens."""
        return 2 * self.num_kv_heads * context * self.head_dim * dtype.itemsize


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder; ``family`` names the transformers model of that shape."""

    layer: Layer
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    family: str = "llama"
    is_tied: bool = False


SHAPES = {
    "llama-3.2-1b": ModelShape(Layer(32, 8, 64), 16, 2048, 8192, 128256, 5e5, is_tied=True),
    "llama-3-8b": ModelShape(Layer(32, 8, 128), 32, 4096, 14336, 128256, 5e5),
    "qwen3-4b": ModelShape(Layer(32, 8, 128), 36, 2560, 9728, 151936, 1e6, "qwen3", True),
    "llama-2-7b": ModelShape(Layer(32, 32, 128), 32, 4096, 11008, 32000, 1e4),
    # For tests: nothing measured on it means anything.
    "tiny": ModelShape(Layer(4, 2, 16), 4, 64, 96, 257, 1e4),
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tokens(text: str) -> int:
    """``"32768"`` or ``"32K"``, a positive number of tokens."""
    scale = 1024 if text[-1:] in ("k", "K") else 1
    try:
        value = int(text.rstrip("kK")) * scale
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected tokens such as 32768 or 32K, got {text!r}")
    return value


def listed(text: str) -> list[str]:
    """``"a,b"`` as a list."""
    return [part for part in text.split(",") if part]


def workload_name(shape: str, dtype: str, batch: int, context: int, threads: int) -> str:
    """The name of a benchmark: what is done, never by which method."""
    return f"{shape}/{dtype}/batch{batch}/context{context}/threads{threads}"
