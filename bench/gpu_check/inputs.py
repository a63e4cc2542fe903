"""One attention layer that decodes: sizes, tensors, and what has to be moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.timing import ROTATED_BYTES
from quest_compile.bench.shapes import SHAPES, Layer
from quest_compile.ops.limits import row_bytes

SCALED_SUMMARIES = ("minmax_int8", "sketch")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One attention layer of a model shape that decodes one token per row."""

    shape: str
    context: int
    batch: int
    budget: int = 2048
    dtype: torch.dtype = torch.bfloat16

    @property
    def layer(self) -> Layer:
        return SHAPES[self.shape].layer

    @property
    def name(self) -> str:
        return f"{self.shape} {self.context} x{self.batch}"

    @property
    def dense_bytes(self) -> int:
        return self.batch * self.layer.cache_bytes(self.context, self.dtype)

    @property
    def score_bytes(self) -> int:
        return self.dense_bytes // 16

    def summary_bytes(self, summary: str) -> int:
        num_pages = self.batch * self.layer.num_kv_heads * self.context // 16
        return num_pages * row_bytes(summary, self.layer.head_dim, 16, 1)

    @property
    def attend_bytes(self) -> int:
        return self.dense_bytes * min(self.budget, self.context) // self.context


@dataclasses.dataclass
class Inputs:
    """The tensors of one call, one of several copies.

    ``scaled``: rows and channel scales of the summaries that have such, by name.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    cache_position: torch.Tensor
    page_summary: torch.Tensor
    scaled: dict[str, tuple[torch.Tensor, torch.Tensor]]
    num_sealed: torch.Tensor
    seq_lens: torch.Tensor
    attn_mask: torch.Tensor
    scores: torch.Tensor
    pages: torch.Tensor


def make_inputs(workload: Workload, device: str, touched_bytes: int) -> list[Inputs]:
    """As many copies as it takes to read more than caches hold, and memory allows."""
    num_copies = max(2, -(-ROTATED_BYTES // max(1, touched_bytes)))
    size = workload.dense_bytes * 1.1
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**28
    if size * 1.3 > free:
        raise MemoryError(f"{size / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")
    num_copies = max(1, min(num_copies, 32, int(0.6 * free / size)))
    return [_make(workload, device, seed) for seed in range(num_copies)]


def _make(workload: Workload, device: str, seed: int) -> Inputs:
    layer, context, batch = workload.layer, workload.context, workload.batch
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {
        "generator": generator, "device": device, "dtype": workload.dtype
    }  # fmt: skip
    shape = (batch, layer.num_kv_heads, context, layer.head_dim)
    keys, values = torch.randn(shape, **options), torch.randn(shape, **options)
    query = torch.randn(batch, layer.num_q_heads, 1, layer.head_dim, **options)
    seq_lens = torch.tensor([context], device=device)
    summary = ops.build_page_summary(keys, seq_lens)
    scaled: Any = {
        name: ops.build_page_summary(keys, seq_lens, summary=name) for name in SCALED_SUMMARIES
    }
    scores = ops.score_pages(query, summary, seq_lens)
    pages = ops.select_pages(scores, seq_lens, page_budget=workload.budget // 16)
    return Inputs(
        query, keys, values, seq_lens - 1, summary, scaled,
        (seq_lens // 16).long(), seq_lens,
        torch.ones(1, 1, 1, context, dtype=torch.bool, device=device), scores, pages
    )  # fmt: skip
