"""One attention layer that decodes: sizes, tensors, and what has to be moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.timing import ROTATED_BYTES
from quest_compile.bench.shapes import SHAPES, Layer
from quest_compile.ops.limits import sketch_row_bytes

SUMMARIES = ("minmax", "sketch")
# Pages that an update compares with their keys, and one that it seals.
_NUM_UPDATED_PAGES = 5


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

    def score_bytes(self, summary: str = "minmax") -> int:
        return self._num_heads * self.context // 16 * self._row_bytes(summary)

    def update_bytes(self, summary: str) -> int:
        keys = 16 * self.layer.head_dim * self.dtype.itemsize
        return self._num_heads * _NUM_UPDATED_PAGES * (keys + self._row_bytes(summary))

    @property
    def _num_heads(self) -> int:
        return self.batch * self.layer.num_kv_heads

    def _row_bytes(self, summary: str) -> int:
        if summary == "minmax":
            return 2 * self.layer.head_dim * self.dtype.itemsize
        return sketch_row_bytes(self.layer.head_dim, 16, 1)

    @property
    def attend_bytes(self) -> int:
        return self.dense_bytes * min(self.budget, self.context) // self.context


@dataclasses.dataclass
class State:
    """The page summary of a cache, and the step that keeps it up to date."""

    rows: torch.Tensor
    channel_scale: torch.Tensor | None
    num_sealed: torch.Tensor
    cache_position: torch.Tensor
    seq_lens: torch.Tensor


@dataclasses.dataclass
class Inputs:
    """The tensors of one call, one of several copies.

    ``states``: by summary, at the end of the context. Those with channel scales half a page before
    it: a step that completes as many pages as a power of two takes scales and makes all rows anew.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    states: dict[str, State]
    seq_lens: torch.Tensor
    attn_mask: torch.Tensor
    scores: torch.Tensor
    pages: torch.Tensor


def make_inputs(
    workload: Workload, device: str, touched_bytes: int, summaries: tuple[str, ...] = SUMMARIES
) -> list[Inputs]:
    """As many copies as it takes to read more than caches hold, and memory allows.

    ``summaries``: those of ``states``, min/max among them.
    """
    num_copies = max(2, -(-ROTATED_BYTES // max(1, touched_bytes)))
    # The summaries are a fifth of the caches.
    size = workload.dense_bytes * 1.25
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**28
    if size * 1.2 > free:
        raise MemoryError(f"{size / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")
    num_copies = max(1, min(num_copies, 32, int(0.6 * free / size)))
    return [_make(workload, device, seed, summaries) for seed in range(num_copies)]


def _make(workload: Workload, device: str, seed: int, summaries: tuple[str, ...]) -> Inputs:
    layer, context, batch = workload.layer, workload.context, workload.batch
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {
        "generator": generator, "device": device, "dtype": workload.dtype
    }  # fmt: skip
    shape = (batch, layer.num_kv_heads, context, layer.head_dim)
    keys, values = torch.randn(shape, **options), torch.randn(shape, **options)
    query = torch.randn(batch, layer.num_q_heads, 1, layer.head_dim, **options)
    seq_lens = torch.tensor([context], device=device)
    states = {name: _state(keys, seq_lens, name) for name in summaries}
    scores = ops.score_pages(query, states["minmax"].rows, seq_lens)
    pages = ops.select_pages(scores, seq_lens, page_budget=workload.budget // 16)
    mask = torch.ones(1, 1, 1, context, dtype=torch.bool, device=device)
    return Inputs(query, keys, values, states, seq_lens, mask, scores, pages)


def _state(keys: torch.Tensor, seq_lens: torch.Tensor, summary: str) -> State:
    if summary != "minmax":
        seq_lens = seq_lens - 8
    built: Any = ops.build_page_summary(keys, seq_lens, summary=summary)
    rows, channel_scale = built if isinstance(built, tuple) else (built, None)
    return State(rows, channel_scale, (seq_lens // 16).long(), seq_lens - 1, seq_lens)
