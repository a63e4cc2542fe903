"""Launchers of scale_and_weigh and seal_and_score."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.triton import score_scaled as kernels
from quest_compile.ops.triton.launch import (
    Lengths,
    Mask,
    last_contiguous,
    on_device,
    power_of_two,
)
from quest_compile.ops.triton.launch_scoring import Update

# What a program holds in registers: bytes of rows when scoring, values when they are made.
_TILE_BYTES, _TILE_VALUES = 4096, 1024


@dataclasses.dataclass(frozen=True)
class ScaledSummary:
    """Rows of bytes [B, K, num_pages, bytes_per_page] and channel_scale [B, K, 3, D]."""

    rows: Tensor
    channel_scale: Tensor
    sketch_bits: int
    page_size: int

    @property
    def constants(self) -> dict[str, Any]:
        head_dim = self.channel_scale.shape[-1]
        d_pad, t_pad = power_of_two(head_dim, 16), power_of_two(self.page_size)
        # Of a page: keys side by side, or 8 channels of all tokens.
        values = max(d_pad, 8 * t_pad)
        return {
            "BITS": self.sketch_bits,
            "SCALE_SIZE": self.channel_scale[0, 0].numel(),
            "D": head_dim,
            "D_PAD": d_pad,
            "PAGE_SIZE": self.page_size,
            "T_PAD": t_pad,
            "SEAL_TILE": max(2, _TILE_VALUES // values),
        }

    @property
    def page_tile(self) -> int:
        """Pages that are scored at once."""
        constants = self.constants
        row_bytes = constants["T_PAD"] * constants["D_PAD"] // 8
        return max(2, min(64, _TILE_BYTES // row_bytes))

    @property
    def is_aligned(self) -> bool:
        """Do rows begin at multiples of 8 bytes?"""
        strides = self.rows.stride()[:3]
        return self.rows.data_ptr() % 8 == 0 and all(stride % 8 == 0 for stride in strides)


def score_scaled_rows(
    query: Tensor,
    summary: ScaledSummary,
    lengths: Lengths,
    mask: Mask,
    update: Update | None,
    group_reduce: str,
    scale: float | None,
    budget_tokens: int = 0,
    max_seq_len: int | None = None,
) -> Tensor:
    """float32 [B, q_len, S, num_pages]; rows of at most ``budget_tokens`` are left as they are."""
    batch, num_kv_heads, num_pages = summary.rows.shape[:3]
    _, num_q_heads, q_len, head_dim = query.shape
    num_select_heads = num_q_heads if group_reduce == "none" else num_kv_heads
    scores = torch.empty(
        batch, q_len, num_select_heads, num_pages, dtype=torch.float32, device=query.device
    )
    heads = num_q_heads // num_kv_heads if group_reduce == "sum" else 1
    num_scores = num_q_heads // num_kv_heads // heads
    weights = torch.empty(
        batch, q_len, num_kv_heads, num_scores, 2 * head_dim + 8, dtype=torch.float32,
        device=query.device
    )  # fmt: skip
    scale = head_dim**-0.5 if scale is None else scale
    start = _scale_and_weigh(summary, update, last_contiguous(query), weights, heads, scale)
    settings = {
        "IS_MAX": group_reduce == "max",
        "NUM_HEADS": max(1, mask.num_heads // num_select_heads),
    }
    max_seq_len = max_seq_len or num_pages * summary.page_size
    _seal_and_score(
        summary, update, start, weights, lengths, mask, scores, budget_tokens, max_seq_len,
        settings
    )  # fmt: skip
    return scores


def update_scaled(update: Update, summary: ScaledSummary) -> None:
    """update_page_summary, in two launches."""
    start = _scale_and_weigh(summary, update, None, None, 1, 1.0)
    _seal_and_score(
        summary, update, start, None, Lengths(update.last, 0, 0, 0), Mask.of(None, 0), None, 0,
        update.key_cache.shape[2], {"IS_MAX": False, "NUM_HEADS": 1}
    )  # fmt: skip


def _scale_and_weigh(
    summary: ScaledSummary, update: Update | None, query: Tensor | None, weights: Tensor | None,
    heads: int, scale: float
) -> Tensor | None:  # fmt: skip
    """int32 [B, K]: pages from this one on are to be made; None without an update."""
    if update is None and weights is None:
        return None
    rows, (batch, num_kv_heads) = summary.rows, summary.rows.shape[:2]
    keys, first, last, sealed, start, has_next = (None,) * 5 + (False,)
    if update is not None:
        keys, first, last = update.key_cache, update.first, update.last
        sealed, has_next = update.num_sealed, update.num_sealed.shape[0] == 2
        start = torch.empty(batch, num_kv_heads, dtype=torch.int32, device=rows.device)
    with on_device(rows):
        kernels.scale_and_weigh[(num_kv_heads, batch)](
            keys, rows, summary.channel_scale, first, last, sealed, start, query, weights,
            *_strides(keys), *rows.stride()[:3], *_strides(query),
            1 if query is None else query.shape[2], 1 if keys is None else keys.shape[2],
            float(scale), UPDATE=update is not None, SCORE=weights is not None, HAS_NEXT=has_next,
            N=1 if weights is None else weights.shape[3], HEADS=heads, **summary.constants,
            enable_fp_fusion=False,
        )  # fmt: skip
    return start


def _seal_and_score(
    summary: ScaledSummary, update: Update | None, start: Tensor | None, weights: Tensor | None,
    lengths: Lengths, mask: Mask, scores: Tensor | None, budget_tokens: int, max_seq_len: int,
    settings: dict[str, Any]
) -> None:  # fmt: skip
    rows, (batch, num_kv_heads, num_pages) = summary.rows, summary.rows.shape[:3]
    keys, last, sealed = None, None, None
    if update is not None:
        keys, last, sealed = update.key_cache, update.last, update.num_sealed
    tile = summary.page_tile
    pages_per_program = max(tile, min(128, power_of_two(num_pages // 32)))
    grid = (-(-num_pages // pages_per_program), num_kv_heads, batch)
    with on_device(rows):
        kernels.seal_and_score[grid](
            keys, rows, summary.channel_scale, last, sealed, start, weights, lengths.values,
            mask.values, scores, *_strides(keys), *rows.stride()[:3],
            lengths.stride_b, lengths.stride_i, lengths.step,
            1 if weights is None else weights.shape[1], budget_tokens, max_seq_len, num_pages,
            *mask.strides, mask.num_positions, UPDATE=update is not None,
            SCORE=scores is not None,
            HAS_NEXT=sealed is not None and sealed.shape[0] == 2,
            HAS_MASK=mask.values is not None, N=1 if weights is None else weights.shape[3],
            ALIGNED=summary.is_aligned, PAGE_TILE=tile, PAGES_PER_PROGRAM=pages_per_program,
            **settings, **summary.constants, enable_fp_fusion=False,
        )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]
