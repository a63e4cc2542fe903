"""Launcher of attend."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quest_compile.ops.triton import attend as kernels
from quest_compile.ops.triton.launch import (
    LOG2_E,
    Queries,
    last_contiguous,
    on_device,
    power_of_two,
)

# Tokens of a split of a row that attends selected pages, about.
_SPARSE_SPLIT = 128


def attend_rows(
    query: Tensor,
    queries: Queries,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float | None,
    pages: Tensor | None = None,
    page_size: int = 16,
    counters: Tensor | None = None,
    *,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """out [B, Q, q_len, E] and lse [B, Q, q_len] (uninitialised unless ``with_lse``).

    ``pages``: int32 [B, q_len, K or Q, page_budget]; rows that fit the budget, and all without
    pages, attend everything. ``counters``: zeros, int32, one per row and program head.
    """
    query, mask = last_contiguous(query), queries.mask
    batch, num_q_heads, q_len, head_dim = query.shape
    num_kv_heads, max_seq_len = key_cache.shape[1:3]
    value_dim, device = value_cache.shape[3], query.device
    num_lists = num_kv_heads if pages is None else pages.shape[2]
    # Positions that one query head may not attend may hold NaN: heads with masks or pages of their
    # own are apart.
    num_programs = num_q_heads if max(mask.num_heads, num_lists) > num_kv_heads else num_kv_heads
    if mask.num_heads > 1:
        num_programs = num_q_heads
    heads = num_q_heads // num_programs
    page_budget, split_pages, num_splits = 0, 1, 0
    max_splits = int(kernels.MAX_SPLITS.value)
    if pages is not None:
        page_budget = pages.shape[3]
        split_tokens = max(_SPARSE_SPLIT, -(-page_budget * page_size // max_splits))
        split_pages = max(1, -(-split_tokens // page_size))
        num_splits = -(-page_budget // split_pages)
    num_dense = min(max_seq_len, queries.budget_tokens) if pages is not None else max_seq_len
    num_splits = max(num_splits, min(max_splits, -(-num_dense // int(kernels.DENSE_SPLIT.value))))
    out = query.new_empty(batch, q_len, num_q_heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, q_len, num_q_heads, dtype=torch.float32, device=device)
    if counters is None:
        counters = torch.zeros(batch, q_len, num_programs, dtype=torch.int32, device=device)
    heads_pad = power_of_two(heads, 16)
    partial = torch.empty(
        batch * q_len * num_programs * num_splits * heads_pad, value_dim, dtype=torch.float32,
        device=device
    )  # fmt: skip
    sums = torch.empty(partial.shape[0], 2, dtype=torch.float32, device=device)
    scale = head_dim**-0.5 if scale is None else scale
    tile, num_warps = _tile(query.dtype, power_of_two(max(head_dim, value_dim)), heads_pad)
    with on_device(query):
        kernels.attend[(num_splits, num_programs, batch * q_len)](
            query, key_cache, value_cache, pages, queries.lengths.values, mask.values, out, lse,
            partial, sums, counters, *query.stride()[:3], *key_cache.stride()[:3],
            *value_cache.stride()[:3], *out.stride()[:3],
            *queries.length_arguments, q_len, queries.budget_tokens, max_seq_len,
            *mask.strides, mask.num_positions, page_budget, split_pages,
            num_programs // num_lists, num_programs // num_kv_heads, num_lists,
            float(scale) * LOG2_E, HAS_PAGES=pages is not None,
            HAS_MASK=mask.values is not None, HAS_LSE=with_lse, HEADS=heads, HEADS_PAD=heads_pad,
            D=head_dim, D_PAD=power_of_two(head_dim, 16), E=value_dim,
            E_PAD=power_of_two(value_dim, 16), E_TILE=min(64, power_of_two(value_dim)),
            PAGE_SIZE=page_size, TILE=tile, WIDEN=_is_interpreted(), NUM_STAGES=2,
            num_warps=num_warps,
        )  # fmt: skip
    return out, lse.transpose(1, 2)


def _tile(dtype: torch.dtype, size: int, heads_pad: int) -> tuple[int, int]:
    """Tokens at once and warps: what registers hold."""
    num_warps = 4 if size * heads_pad <= 2048 else 8
    if dtype == torch.float32:
        return 16, num_warps
    return 64 if size <= 128 else 32, num_warps


@functools.cache
def _is_interpreted() -> bool:
    """The interpreter multiplies matrices of bfloat16 wrongly: it gets float32."""
    import triton

    return bool(triton.knobs.runtime.interpret)
