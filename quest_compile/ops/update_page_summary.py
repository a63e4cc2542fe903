"""Bring the page summary up to date after a write to the key cache."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from quest_compile.ops import checks, reference, require
from quest_compile.ops.counters import count_update_call
from quest_compile.ops.operator import operator
from quest_compile.ops.settings import FormatSettings, SummaryFormat


def check(key_cache, cache_position, page_summary, num_sealed, **settings):
    require.tensors(
        key_cache=key_cache,
        cache_position=cache_position,
        page_summary=page_summary,
        num_sealed=num_sealed,
    )
    page_format = SummaryFormat(**settings)
    checks.key_cache(key_cache)
    checks.page_summary_of(page_summary, page_format, key_cache)
    require.rank("cache_position", cache_position, 1, "[num_written]")
    num_written = cache_position.shape[0]
    require.that(num_written >= 1, lambda: "cache_position: expected positions, got none")
    require.rank("num_sealed", num_sealed, 1, "[1] or [2]")
    if num_sealed.shape[0] not in (1, 2):
        raise ValueError(f"num_sealed: expected [1] or [2], got shape {list(num_sealed.shape)}")
    for name, tensor in (("cache_position", cache_position), ("num_sealed", num_sealed)):
        require.dtype(name, tensor, torch.int64)
        require.device(name, tensor, key_cache)
    require.values("cache_position", cache_position, 0, key_cache.shape[2] - 1)


def _reference(key_cache, cache_position, page_summary, num_sealed, **settings):
    tensors = (key_cache, cache_position, page_summary, num_sealed)
    count_update_call(*reference.update_page_summary(*tensors, **settings))


_OPERATOR = operator(
    "update_page_summary",
    "(Tensor key_cache, Tensor cache_position, Tensor(a!) page_summary, Tensor(b!) num_sealed, *, "
    f"{SummaryFormat.schema()}) -> ()",
    check=check,
    reference=_reference,
    fake=lambda *tensors, **settings: None,
)


def update_page_summary(
    key_cache: Tensor,
    cache_position: Tensor,
    page_summary: Tensor,
    num_sealed: Tensor,
    **settings: Unpack[FormatSettings],
) -> None:
    """Summarise, in place, every page that a write completed or changed.

    Pages are always summarised from all of their keys. Pages that were summarised before are
    sampled: where the keys are others than then, that row and KV head start again from page 0.

    Args:
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous, as
            it is after the write.
        cache_position: int64 [n], the positions that were written.
        page_summary: [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of key_cache;
            written: elementwise minimum and maximum of the keys of each complete page.
            With summary="sketch" uint8 [batch, num_kv_heads, num_pages, bytes_per_page]
            (summaries/sketch.py has the layout): the mean of the keys in 8 bits, and what is left
            of each key as its scale and a bit or two per channel.
        num_sealed: int64 [1] or [2]. First: leading pages whose summary is known to be up to date;
            0 before the first update, and to have everything summarised again. Second, if there:
            the position at which the next write has to begin, or else everything is summarised
            again; -1 for no such check. Written.
        settings: those of SummaryFormat.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    _OPERATOR(key_cache, cache_position, page_summary, num_sealed, **settings)
