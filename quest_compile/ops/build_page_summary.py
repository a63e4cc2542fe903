"""Page summaries from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest_compile.ops import checks, limits, require, summary_checks
from quest_compile.ops.update_page_summary import update_page_summary


def empty_page_summary(
    key_cache: Tensor, page_size: int = 16, summary: str = "minmax", sketch_bits: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised page_summary and channel_scale of this cache, for update_page_summary.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    require.tensors(key_cache=key_cache)
    checks.page_size(page_size)
    summary_checks.summary_kind(summary, sketch_bits)
    require.rank("key_cache", key_cache, 4, "[batch, num_kv_heads, max_seq_len, head_dim]")
    batch, num_kv_heads, max_seq_len, head_dim = key_cache.shape
    pages = (batch, num_kv_heads, limits.num_pages_of(max_seq_len, page_size))
    if summary == "minmax":
        return key_cache.new_empty(*pages, 2, head_dim), None
    row_bytes = limits.sketch_row_bytes(head_dim, page_size, sketch_bits)
    rows = key_cache.new_empty(*pages, row_bytes, dtype=torch.uint8)
    return rows, key_cache.new_ones(batch, num_kv_heads, 3, head_dim, dtype=torch.float32)


def build_page_summary(
    key_cache: Tensor,
    seq_lens: Tensor,
    page_size: int = 16,
    summary: str = "minmax",
    sketch_bits: int = 1,
) -> Any:
    """The summary of every complete page; rows of other pages are left uninitialised.

    Args:
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous.
        seq_lens: int32 or int64 [batch] or [1], valid positions.
        page_size: positions per page, a multiple of 8 from 8 to 128.
        summary: "minmax" or "sketch".
        sketch_bits: 1 or 2, with summary="sketch".

    Returns:
        "minmax": [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of key_cache:
        [..., 0, :] is the elementwise minimum of the keys of a page, [..., 1, :] the maximum.
        "sketch": page_summary, uint8 [batch, num_kv_heads, num_pages, bytes_per_page], and
        channel_scale, float32 (see update_page_summary).

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    require.tensors(seq_lens=seq_lens)
    page_summary, channel_scale = empty_page_summary(key_cache, page_size, summary, sketch_bits)
    checks.seq_lens(seq_lens, key_cache, key_cache.shape[2])
    last = seq_lens.max().long() - 1
    cache_position = torch.stack([torch.zeros_like(last), last])
    num_sealed = torch.zeros(1, dtype=torch.int64, device=key_cache.device)
    arguments = (key_cache, cache_position, page_summary, num_sealed, channel_scale)
    update_page_summary(*arguments, page_size=page_size, summary=summary, sketch_bits=sketch_bits)
    return page_summary if channel_scale is None else (page_summary, channel_scale)
