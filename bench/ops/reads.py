"""What a step reads by its setting: on a GPU operators see no values and count none."""

from __future__ import annotations

import dataclasses

import torch

from quest_compile import ops
from quest_compile.bench.ops.inputs import Setting


@dataclasses.dataclass(frozen=True)
class Reads:
    """``tokens`` that a query attends; ``num_bytes`` of page summaries, keys and values."""

    tokens: int
    num_bytes: int


def is_sparse(setting: Setting, seq_len: int) -> bool:
    """Does a query over ``seq_len`` tokens leave pages out?"""
    return seq_len > setting.budget // setting.page_size * setting.page_size


def reads_of(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    seq_len: int,
    setting: Setting | None,
) -> Reads:
    """Of one layer over ``seq_len`` tokens in all rows, as the counters of CPU operators say.

    ``key_cache``, ``value_cache`` [B, num_kv_heads, max_seq_len, head_dim]; ``setting``: None where
    everything is attended.
    """
    batch, num_kv_heads, _, head_dim = key_cache.shape
    token_bytes = (head_dim + value_cache.shape[3]) * key_cache.element_size()
    if setting is None or not is_sparse(setting, seq_len):
        return Reads(seq_len, batch * num_kv_heads * seq_len * token_bytes)
    page_size = setting.page_size
    # All selected pages are full, but for the newest.
    tokens = setting.budget // page_size * page_size - -seq_len % page_size
    num_bytes = tokens * token_bytes + seq_len // page_size * _row_bytes(key_cache, setting)
    return Reads(tokens, batch * num_kv_heads * num_bytes)


def _row_bytes(key_cache: torch.Tensor, setting: Setting) -> int:
    """Of the page summary of one page and KV head."""
    shape = (1, 1, setting.page_size, key_cache.shape[3])
    page = torch.empty(shape, dtype=key_cache.dtype, device="meta")
    rows, _ = ops.empty_page_summary(page, setting.page_size, setting.summary)
    return rows[0, 0, 0].numel() * rows.element_size()
