"""Page summaries from scratch."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_compile.ops import checks, limits, require
from quest_compile.ops.update_page_summary import update_page_summary


def empty_page_summary(key_cache: Tensor, page_size: int = 16, summary: str = "minmax") -> Tensor:
    """Uninitialised [batch, num_kv_heads, num_pages, 2, head_dim] for this cache, in its dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    require.tensors(key_cache=key_cache)
    checks.page_size(page_size)
    if summary not in limits.SUMMARIES:
        expected = ", ".join(map(repr, limits.SUMMARIES))
        raise ValueError(f"summary: expected {expected}, got {summary!r}")
    require.rank("key_cache", key_cache, 4, "[batch, num_kv_heads, max_seq_len, head_dim]")
    batch, num_kv_heads, max_seq_len, head_dim = key_cache.shape
    num_pages = limits.num_pages_of(max_seq_len, page_size)
    shape = (batch, num_kv_heads, num_pages, 2, head_dim)
    return torch.empty(shape, dtype=key_cache.dtype, device=key_cache.device)


def build_page_summary(
    key_cache: Tensor, seq_lens: Tensor, page_size: int = 16, summary: str = "minmax"
) -> Tensor:
    """The summary of every complete page; rows of other pages are left uninitialised.

    Args:
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous.
        seq_lens: int32 or int64 [batch] or [1], valid positions.
        page_size: positions per page, a multiple of 8 from 8 to 128.
        summary: "minmax".

    Returns:
        [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of key_cache: [..., 0, :] is the
        elementwise minimum of the keys of a page, [..., 1, :] the maximum.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    require.tensors(seq_lens=seq_lens)
    page_summary = empty_page_summary(key_cache, page_size, summary)
    checks.seq_lens(seq_lens, key_cache, key_cache.shape[2])
    last = seq_lens.max().long() - 1
    cache_position = torch.stack([torch.zeros_like(last), last])
    num_sealed = torch.zeros(1, dtype=torch.int64, device=key_cache.device)
    update_page_summary(key_cache, cache_position, page_summary, num_sealed, page_size=page_size)
    return page_summary
