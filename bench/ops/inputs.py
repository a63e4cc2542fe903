"""The tensors that a call takes, in several copies, so that all begin with cold caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.shapes import Layer
from quest_compile.huge_pages import use_huge_pages

# Larger than the last-level cache of the machine together.
_ROTATED_BYTES = 256 * 2**20
_FLUSHED_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Setting:
    """How Quest decodes; the name is the method of the results."""

    summary: str = "minmax"
    budget: int = 2048
    page_size: int = 16

    @property
    def name(self) -> str:
        kind = self.summary.removeprefix("minmax").replace("_", "-")
        if kind and not kind.startswith("-"):
            kind = f"-{kind}"
        page = "" if self.page_size == 16 else f"_page{self.page_size}"
        return f"quest{kind}_{self.budget}{page}"

    @property
    def layout(self) -> tuple[str, int]:
        return self.summary, self.page_size


@dataclasses.dataclass
class Step:
    """One of several copies.

    ``query`` [B, num_q_heads, 1, head_dim]; ``key_cache``, ``value_cache`` [B, num_kv_heads,
    context, head_dim]; ``seq_lens`` [1]; ``attn_mask`` bool [B, 1, 1, context], all true;
    ``summaries``: page_summary and channel_scale (or None) by kind and page size.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    seq_lens: torch.Tensor
    attn_mask: torch.Tensor
    summaries: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor | None]]


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

    @property
    def dense_bytes(self) -> int:
        return self.batch * self.layer.cache_bytes(self.context, self.dtype)


def make_steps(workload: Workload, settings: list[Setting]) -> list[Step]:
    """As many copies of a full cache as it takes to leave the last-level cache."""
    layer, batch, context = workload.layer, workload.batch, workload.context
    steps = []
    for seed in range(max(2, -(-_ROTATED_BYTES // workload.dense_bytes))):
        generator = torch.Generator().manual_seed(seed)

        key_cache, value_cache = (
            _normal(workload, generator, layer.num_kv_heads, context) for _ in range(2)
        )
        seq_lens = torch.tensor([context], device=workload.device)
        steps.append(
            Step(
                query=_normal(workload, generator, layer.num_q_heads, 1),
                key_cache=key_cache,
                value_cache=value_cache,
                seq_lens=seq_lens,
                attn_mask=torch.ones(
                    batch, 1, 1, context, dtype=torch.bool, device=workload.device
                ),
                summaries={s.layout: _summary(key_cache, seq_lens, s) for s in settings},
            )
        )
        # As compiled models do.
        for tensor in (key_cache, value_cache, *(rows for rows, _ in steps[-1].summaries.values())):
            use_huge_pages(tensor)
    return steps


def _normal(
    workload: Workload, generator: torch.Generator, num_heads: int, num_tokens: int
) -> torch.Tensor:
    shape = (workload.batch, num_heads, num_tokens, workload.layer.head_dim)
    return torch.randn(shape, generator=generator).to(workload.device, workload.dtype)


def _summary(
    key_cache: torch.Tensor, seq_lens: torch.Tensor, setting: Setting
) -> tuple[torch.Tensor, torch.Tensor | None]:
    built: Any = ops.build_page_summary(
        key_cache, seq_lens, page_size=setting.page_size, summary=setting.summary
    )
    return built if isinstance(built, tuple) else (built, None)


class CacheFlush:
    """A read of other memory, which leaves caches cold and threads awake."""

    def __init__(self, device: str) -> None:
        # The last-level cache of a GPU is smaller, but is kept by reads of any size.
        self._other = torch.ones(_FLUSHED_BYTES // 4, device=device)

    def __call__(self) -> None:
        self._other.sum()
        if self._other.is_cuda:
            torch.cuda.synchronize()
