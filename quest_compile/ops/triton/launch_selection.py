"""Launcher of select."""

from __future__ import annotations

import bisect
import functools
import struct
from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.reference import page_budget_of
from quest_compile.ops.settings import Selection, SummaryFormat
from quest_compile.ops.triton import select as kernels
from quest_compile.ops.triton.launch import LOG2_E, Queries, on_device, power_of_two
from quest_compile.ops.triton.launch_scoring import Tiles, Update
from quest_compile.ops.triton.row_format import row_format


def select_rows(
    scores: Tensor,
    queries: Queries,
    selection: Selection,
    page_size: int,
    score_scale: float | None,
    *,
    joined: int = 0,
    update: Update | None = None,
    num_counters: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """int32 [B, q_len, S, page_budget]: pages of rows that do not fit the budget; and zeros, int32
    [B, q_len, num_counters]. ``scores``: contiguous [B, q_len, S, num_pages], with ``joined`` heads
    of each of these [B, q_len, S * joined, num_pages]."""
    mask, page_budget = queries.mask, selection.budget // page_size
    batch, q_len, num_heads, num_pages = scores.shape
    num_heads //= max(1, joined)
    tiles = Tiles.of(num_pages)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=scores.device)
    pages = empty(batch, q_len, num_heads, page_budget)
    counters = empty(batch, q_len, num_counters) if num_counters else None
    shares = scores.new_empty(batch, q_len, num_heads, num_pages) if joined else None
    ranks = empty(batch, q_len, num_heads, num_pages if tiles.number > 1 else 1).view(torch.uint32)
    finish, heads_per_kv_head, num_warps = (None,) * 5 + (0,) * 6, 1, tiles.num_warps
    constants: dict[str, Any] = {"HAS_NEXT": False, "F": row_format(SummaryFormat(page_size), 16)}
    if update is not None:
        finish, constants = update.finish_arguments(), update.constants
        heads_per_kv_head = num_heads // update.key_cache.shape[1]
        num_warps = max(num_warps, constants["F"].num_warps)
    with on_device(scores):
        kernels.select[(num_heads, batch * q_len)](
            scores, shares, queries.lengths.values, mask.words, ranks, pages, counters,
            *queries.length_arguments, q_len, queries.budget_tokens, queries.max_seq_len,
            *mask.word_strides, mask.num_positions, num_pages, page_budget,
            selection.num_sink_pages, selection.num_recent_pages,
            _bits_of(selection.budget_fraction), _bits_of(selection.top_p),
            None if score_scale is None else float(score_scale) * LOG2_E, num_counters, *finish,
            **constants, UPDATE=update is not None, HEADS_PER_KV_HEAD=heads_per_kv_head,
            JOINED=joined, HAS_FRACTION=selection.budget_fraction < 1,
            HAS_TOP_P=selection.top_p < 1, HAS_MASK=mask.values is not None,
            HAS_COUNTERS=counters is not None, NUM_HEADS=max(1, mask.num_heads // num_heads),
            PAGE_SIZE=page_size, PAGE_TILE=tiles.size, NUM_TILES=tiles.number,
            BUDGET_PAD=power_of_two(page_budget), enable_fp_fusion=False, num_warps=num_warps,
        )  # fmt: skip
    return pages, counters


@functools.cache
def fitting_pages(selection: Selection, page_size: int) -> int:
    """A row with that many pages in use, or fewer, attends them all."""
    page_budget = selection.budget // page_size
    limits = selection.in_pages(page_size)
    num_pages = range(1, page_budget + 1)
    return bisect.bisect_left(num_pages, True, key=lambda n: n > page_budget_of(n, **limits))


def _bits_of(value: float) -> int:
    """Of a float64, as an integer: Triton would hand it on as float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
