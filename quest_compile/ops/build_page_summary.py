"""Page summaries from scratch."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from quest_compile.ops import checks, require
from quest_compile.ops.settings import FormatSettings, SummaryFormat
from quest_compile.ops.summaries import SUMMARIES
from quest_compile.ops.update_page_summary import update_page_summary


def empty_page_summary(key_cache: Tensor, **settings: Unpack[FormatSettings]) -> Tensor:
    """Uninitialised page_summary of this cache, for update_page_summary.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    require.tensors(key_cache=key_cache)
    page_format = SummaryFormat(**settings)
    require.rank("key_cache", key_cache, 4, "[batch, num_kv_heads, max_seq_len, head_dim]")
    batch, num_kv_heads, max_seq_len, head_dim = key_cache.shape
    row = SUMMARIES[page_format.summary].row(head_dim, key_cache.dtype, page_format)
    num_pages = page_format.num_pages(max_seq_len)
    return key_cache.new_empty(batch, num_kv_heads, num_pages, *row.shape, dtype=row.dtype)


def build_page_summary(
    key_cache: Tensor, seq_lens: Tensor, **settings: Unpack[FormatSettings]
) -> Tensor:
    """The summary of every complete page; rows of other pages are left uninitialised.

    Args:
        key_cache: [batch, num_kv_heads, max_seq_len, head_dim], the last dimension contiguous.
        seq_lens: int32 or int64 [batch] or [1], valid positions.
        settings: those of SummaryFormat.

    Returns:
        "minmax": [batch, num_kv_heads, num_pages, 2, head_dim] in the dtype of key_cache:
        [..., 0, :] is the elementwise minimum of the keys of a page, [..., 1, :] the maximum.
        "sketch": uint8 [batch, num_kv_heads, num_pages, bytes_per_page].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    require.tensors(seq_lens=seq_lens)
    page_summary = empty_page_summary(key_cache, **settings)
    checks.seq_lens(seq_lens, key_cache, key_cache.shape[2])
    last = seq_lens.max().long() - 1
    cache_position = torch.stack([torch.zeros_like(last), last])
    num_sealed = torch.zeros(1, dtype=torch.int64, device=key_cache.device)
    update_page_summary(key_cache, cache_position, page_summary, num_sealed, **settings)
    return page_summary
