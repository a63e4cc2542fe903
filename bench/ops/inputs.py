"""One attention layer that decodes: sizes, and the tensors of a call, in copies that begin cold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import psutil
import torch

from quest_compile import ops
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import SHAPES, Layer, dtype_name, workload_name
from quest_compile.huge_pages import use_huge_pages

# Larger than the last-level cache of the machine together.
ROTATED_BYTES = 256 * 2**20
_MAX_COPIES = 64
_FLUSHED_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is measured: one decode step of one attention layer over ``context`` tokens."""

    shape: str
    layer: Layer
    context: int
    dtype: torch.dtype
    batch: int = 1
    threads: int = 1
    device: str = "cpu"

    @classmethod
    def of_shape(
        cls, shape: str, context: int, batch: int, device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16
    ) -> Workload:  # fmt: skip
        return cls(shape, SHAPES[shape].layer, context, dtype, batch, device=device)

    @property
    def name(self) -> str:
        return workload_name(
            self.shape, dtype_name(self.dtype), self.batch, self.context, self.threads
        )

    @property
    def dense_bytes(self) -> int:
        return self.batch * self.layer.cache_bytes(self.context, self.dtype)


@dataclasses.dataclass
class Step:
    """One of several copies.

    ``query`` [B, num_q_heads, 1, head_dim]; ``key_cache``, ``value_cache`` [B, num_kv_heads,
    context, head_dim]; ``seq_lens``, ``cache_position`` [1]; ``attn_mask`` bool [B, 1, 1, context],
    all true; ``page_summary`` and ``num_sealed`` by the format of the pages, up to date.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    seq_lens: torch.Tensor
    cache_position: torch.Tensor
    attn_mask: torch.Tensor
    page_summary: dict[ops.SummaryFormat, torch.Tensor]
    num_sealed: dict[ops.SummaryFormat, torch.Tensor]

    @property
    def caches(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key_cache, self.value_cache


def make_steps(
    workload: Workload, settings: Sequence[Setting], touched_bytes: int | None = None
) -> list[Step]:
    """As many copies of a full cache as it takes to leave the last-level cache, and memory allows.

    ``touched_bytes``: what a call reads, all keys and values if None.

    Raises:
        MemoryError: there is no room for one.
    """
    num_copies = max(2, -(-ROTATED_BYTES // (touched_bytes or workload.dense_bytes)))
    # Page summaries are a fifth of the caches at most.
    size = 1.25 * workload.dense_bytes
    is_cuda = workload.device == "cuda"
    free = torch.cuda.mem_get_info()[0] if is_cuda else psutil.virtual_memory().available
    if 1.2 * size > free:
        raise MemoryError(f"{size / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")
    num_copies = max(1, min(num_copies, _MAX_COPIES, int(0.6 * free / size)))
    formats = dict.fromkeys(setting.page_format for setting in settings)
    return [_make_step(workload, formats, seed) for seed in range(num_copies)]


def _make_step(workload: Workload, formats: Iterable[ops.SummaryFormat], seed: int) -> Step:
    layer, batch, context, device = (
        workload.layer, workload.batch, workload.context, workload.device
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)

    def normal(num_heads: int, num_tokens: int) -> torch.Tensor:
        shape = (batch, num_heads, num_tokens, layer.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=workload.dtype)

    keys, values = (normal(layer.num_kv_heads, context) for _ in range(2))
    seq_lens = torch.tensor([context], device=device)
    page_summary = {
        page_format: ops.build_page_summary(keys, seq_lens, **page_format.as_kwargs())
        for page_format in formats
    }
    # As compiled models do.
    for tensor in (keys, values, *page_summary.values()):
        use_huge_pages(tensor)
    return Step(
        query=normal(layer.num_q_heads, 1),
        key_cache=keys,
        value_cache=values,
        seq_lens=seq_lens,
        cache_position=seq_lens - 1,
        attn_mask=torch.ones(batch, 1, 1, context, dtype=torch.bool, device=device),
        page_summary=page_summary,
        num_sealed={page_format: seq_lens // page_format.page_size for page_format in formats},
    )


class CacheFlush:
    """A read of other memory, which leaves caches cold and threads awake."""

    def __init__(self, device: str) -> None:
        # The last-level cache of a GPU is smaller, but is kept by reads of any size.
        self._other = torch.ones(_FLUSHED_BYTES // 4, device=device)

    def __call__(self) -> None:
        self._other.sum()
        if self._other.is_cuda:
            torch.cuda.synchronize()
