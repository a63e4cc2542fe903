"""Launchers of update_and_score, record_update and join_scores."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.settings import SummaryFormat
from quest_compile.ops.triton import shares
from quest_compile.ops.triton import update_and_score as kernels
from quest_compile.ops.triton.launch import (
    Lengths,
    Mask,
    Queries,
    last_contiguous,
    on_device,
    power_of_two,
)
from quest_compile.ops.triton.row_format import RowFormat, row_format

# Pages of a row that fit the registers of one program.
_MAX_TILE = 8192


@dataclasses.dataclass
class Update:
    """What update_page_summary takes, and what its launches leave for each other."""

    key_cache: Tensor
    cache_position: Tensor
    page_summary: Tensor
    num_sealed: Tensor
    page_format: SummaryFormat

    def __post_init__(self) -> None:
        positions = self.cache_position
        self.first, self.last = positions, positions
        if positions.shape[0] > 1:
            self.first, self.last = positions.aminmax()

    @functools.cached_property
    def stale(self) -> Tensor:
        """int32 [B, K], written: heads in which a foreign write was found."""
        keys = self.key_cache
        return torch.empty(keys.shape[:2], dtype=torch.int32, device=keys.device)

    def finish_arguments(self) -> tuple[Any, ...]:
        """key_ptr to the strides of the summary, as finish_update takes them."""
        tensors = (self.key_cache, self.page_summary, self.last, self.num_sealed, self.stale)
        return (*tensors, *self.key_cache.stride()[:3], *self.page_summary.stride()[:3])

    @property
    def constants(self) -> dict[str, Any]:
        rows = row_format(self.page_format, self.key_cache.shape[3])
        return {"HAS_NEXT": self.num_sealed.shape[0] == 2, "F": rows}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of a row of scores, as one program reads it."""

    size: int
    number: int
    num_warps: int

    @classmethod
    def of(cls, num_pages: int) -> Tiles:
        size = power_of_two(min(num_pages, _MAX_TILE), 16)
        return cls(size, -(-num_pages // size), 4 if size <= 2048 else 8)


def score_rows(
    query: Tensor,
    queries: Queries,
    page_summary: Tensor,
    update: Update | None,
    page_format: SummaryFormat,
    group_reduce: str,
    scale: float | None,
) -> Tensor:
    """float32 [B, q_len, S, num_pages], of each head with "softmax"; rows that fit the budget are
    left as they are."""
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    _, num_q_heads, q_len, head_dim = query.shape
    heads = num_q_heads // num_kv_heads if group_reduce == "sum" else 1
    num_scores = num_q_heads // num_kv_heads // heads
    scores = torch.empty(
        batch, q_len, num_kv_heads * num_scores, num_pages, dtype=torch.float32,
        device=query.device
    )  # fmt: skip
    scale = head_dim**-0.5 if scale is None else scale
    if page_format.summary == "sketch":
        # Rotation makes products larger by the channels of a block.
        scale /= head_dim & -head_dim
    elif group_reduce != "softmax":
        scale, queries = 1.0, dataclasses.replace(queries, mask=Mask.of(None, 0))
    rows = row_format(page_format, head_dim)
    query = last_contiguous(query)
    _launch(query, queries, page_summary, update, rows, scores, scale, num_scores, heads)
    return scores


def join_rows(scores: Tensor, num_kv_heads: int) -> Tensor:
    """float32 [B, q_len, Q, num_pages] of "softmax" -> shares [B, q_len, K, num_pages]."""
    batch, q_len, num_heads, num_pages = scores.shape
    joined = scores.new_empty(batch, q_len, num_kv_heads, num_pages)
    tiles = Tiles.of(num_pages)
    with on_device(scores):
        shares.join_scores[(batch * q_len * num_kv_heads,)](
            scores, joined, num_pages, N=num_heads // num_kv_heads, PAGE_TILE=tiles.size,
            NUM_TILES=tiles.number, num_warps=tiles.num_warps,
        )  # fmt: skip
    return joined


def update_alone(update: Update) -> None:
    """update_page_summary, in two launches."""
    keys, constants = update.key_cache, update.constants
    queries = Queries(Lengths(update.last, 0, 0, 0), Mask.of(None, 0), keys.shape[2])
    _launch(None, queries, update.page_summary, update, constants["F"], None, 1.0, 1, 1)
    batch, num_kv_heads = keys.shape[:2]
    with on_device(keys):
        kernels.record_update[(num_kv_heads, batch)](
            *update.finish_arguments(), keys.shape[2], **constants, enable_fp_fusion=False,
            num_warps=constants["F"].num_warps,
        )  # fmt: skip


def _launch(
    query: Tensor | None, queries: Queries, page_summary: Tensor, update: Update | None,
    rows: RowFormat, scores: Tensor | None, scale: float, num_scores: int, heads: int
) -> None:  # fmt: skip
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    # Many programs for few pages; for many pages few, which share the look for stale ones.
    pages_per_program = max(rows.PAGE_TILE.value, min(128, power_of_two(num_pages // 32)))
    grid = (-(-num_pages // pages_per_program), num_kv_heads, batch)
    keys, first, last, sealed, stale = (None,) * 5
    if update is not None:
        keys, first, last = update.key_cache, update.first, update.last
        sealed, stale = update.num_sealed, update.stale
    mask = queries.mask
    mask_heads = max(1, mask.num_heads // num_kv_heads)
    with on_device(page_summary):
        kernels.update_and_score[grid](
            keys, page_summary, first, last, sealed, stale, query, queries.lengths.values,
            mask.values, scores, *_strides(keys), *page_summary.stride()[:3], *_strides(query),
            *queries.length_arguments, 1 if query is None else query.shape[2],
            queries.budget_tokens, queries.max_seq_len, num_pages, *mask.strides,
            mask.num_positions, float(scale), UPDATE=update is not None, SCORE=scores is not None,
            HAS_NEXT=sealed is not None and sealed.shape[0] == 2,
            HAS_MASK=mask.values is not None, N=num_scores, N_PAD=power_of_two(num_scores),
            HEADS=heads, M=mask_heads, M_PAD=power_of_two(mask_heads),
            PAGES_PER_PROGRAM=pages_per_program, F=rows, enable_fp_fusion=False,
            num_warps=rows.num_warps,
        )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]
