"""Launcher of select."""

from __future__ import annotations

import bisect
import functools
import struct

import torch
from torch import Tensor

from quest_compile.ops import reference_selection
from quest_compile.ops.triton import select as kernels
from quest_compile.ops.triton.launch import LOG2_E, Lengths, Mask, on_device, power_of_two
from quest_compile.ops.triton.launch_scoring import Update, page_tile

# Pages of a row that fit the registers of one program.
_MAX_TILE = 8192


def select_rows(
    scores: Tensor,
    lengths: Lengths,
    mask: Mask,
    page_budget: int,
    page_size: int,
    num_sink_pages: int,
    num_recent_pages: int,
    *,
    budget_tokens: int = 0,
    max_seq_len: int | None = None,
    update: Update | None = None,
    num_counters: int = 0,
    budget_fraction: float = 1.0,
    top_p: float = 1.0,
    score_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """int32 [B, q_len, S, page_budget]: pages of rows of more than ``budget_tokens``; and zeros,
    int32 [B, q_len, num_counters]. ``scores``: contiguous [B, q_len, S, num_pages]."""
    batch, q_len, num_heads, num_pages = scores.shape
    tile = power_of_two(min(num_pages, _MAX_TILE), 16)
    num_tiles = -(-num_pages // tile)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=scores.device)
    pages = empty(batch, q_len, num_heads, page_budget)
    counters = empty(batch, q_len, num_counters) if num_counters else None
    ranks = scores.view(torch.uint32)
    if num_tiles > 1:
        ranks = torch.empty(scores.shape, dtype=torch.uint32, device=scores.device)
    finish, constants, heads_per_kv_head, seal_tile = (None,) * 5 + (0,) * 6, None, 1, 16
    if update is not None:
        finish, constants = update.finish_arguments(), dict(update.constants)
        heads_per_kv_head = num_heads // update.key_cache.shape[1]
        seal_tile = page_tile(update.key_cache.shape[3])
    constants = constants or {"HAS_NEXT": False, "D": 16, "D_PAD": 16}
    constants["PAGE_SIZE"] = page_size
    with on_device(scores):
        kernels.select[(num_heads, batch * q_len)](
            scores, lengths.values, mask.words, ranks, pages, counters,
            lengths.stride_b, lengths.stride_i, lengths.step, q_len, budget_tokens,
            max_seq_len or num_pages * page_size, *mask.word_strides, mask.num_positions,
            num_pages, page_budget, num_sink_pages, num_recent_pages, _bits_of(budget_fraction),
            _bits_of(top_p), float(score_scale) * LOG2_E, num_counters, *finish,
            **constants, UPDATE=update is not None, HEADS_PER_KV_HEAD=heads_per_kv_head,
            HAS_FRACTION=budget_fraction < 1, HAS_TOP_P=top_p < 1, SEAL_TILE=seal_tile,
            HAS_MASK=mask.values is not None,
            HAS_COUNTERS=counters is not None, NUM_HEADS=max(1, mask.num_heads // num_heads),
            PAGE_TILE=tile, NUM_TILES=num_tiles, BUDGET_PAD=power_of_two(page_budget),
            num_warps=4 if tile <= 2048 else 8,
        )  # fmt: skip
    return pages, counters


@functools.cache
def fitting_pages(
    page_budget: int, num_sink_pages: int, num_recent_pages: int, budget_fraction: float
) -> int:
    """A row with that many pages in use, or fewer, attends them all."""
    budget_of = functools.partial(
        reference_selection.page_budget_of, page_budget=page_budget, num_sink_pages=num_sink_pages,
        num_recent_pages=num_recent_pages, budget_fraction=budget_fraction
    )  # fmt: skip
    num_pages = range(1, page_budget + 1)
    return bisect.bisect_left(num_pages, True, key=lambda n: n > budget_of(n))


def _bits_of(value: float) -> int:
    """Of a float64, as an integer: Triton would hand it on as float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
