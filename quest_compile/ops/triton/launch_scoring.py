"""Launchers of update_and_score and record_update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.triton import update_and_score as kernels
from quest_compile.ops.triton.launch import Lengths, last_contiguous, on_device, power_of_two

# Values of a tile of summaries, minimum or maximum: what a program holds in registers.
_TILE_VALUES = 2048


@dataclasses.dataclass
class Update:
    """What update_page_summary takes, and what its launches leave for each other."""

    key_cache: Tensor
    cache_position: Tensor
    page_summary: Tensor
    num_sealed: Tensor
    page_size: int

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
        head_dim = self.key_cache.shape[3]
        return {
            "HAS_NEXT": self.num_sealed.shape[0] == 2,
            "D": head_dim,
            "D_PAD": power_of_two(head_dim, 16),
            "PAGE_SIZE": self.page_size,
        }


def page_tile(head_dim: int) -> int:
    return max(8, _TILE_VALUES // power_of_two(head_dim, 16))


def score_rows(
    query: Tensor,
    page_summary: Tensor,
    lengths: Lengths,
    update: Update | None,
    page_size: int,
    group_reduce: str,
    budget_tokens: int = 0,
    max_seq_len: int | None = None,
) -> Tensor:
    """float32 [B, q_len, S, num_pages]; rows of at most ``budget_tokens`` are left as they are."""
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    _, num_q_heads, q_len, head_dim = query.shape
    num_select_heads = num_q_heads if group_reduce == "none" else num_kv_heads
    scores = torch.empty(
        batch, q_len, num_select_heads, num_pages, dtype=torch.float32, device=query.device
    )
    query = last_contiguous(query)
    settings = {"SCORE": True, "GROUP_REDUCE": group_reduce, "G": num_q_heads // num_kv_heads}
    _launch(
        update, page_summary, query, lengths, scores, q_len, budget_tokens,
        max_seq_len or num_pages * page_size, head_dim, page_size, settings
    )  # fmt: skip
    return scores


def update_alone(update: Update) -> None:
    """update_page_summary, in two launches."""
    keys, page_summary = update.key_cache, update.page_summary
    settings = {"SCORE": False, "GROUP_REDUCE": "sum", "G": 1}
    lengths = Lengths(update.last, 0, 0, 0)
    _launch(
        update, page_summary, None, lengths, None, 1, 0, keys.shape[2], keys.shape[3],
        update.page_size, settings
    )  # fmt: skip
    batch, num_kv_heads = keys.shape[:2]
    with on_device(keys):
        kernels.record_update[(num_kv_heads, batch)](
            *update.finish_arguments(), keys.shape[2], **update.constants,
            PAGE_TILE=page_tile(keys.shape[3]),
        )  # fmt: skip


def _launch(
    update, page_summary, query, lengths, scores, q_len, budget_tokens, max_seq_len, head_dim,
    page_size, settings
):  # fmt: skip
    batch, num_kv_heads, num_pages = page_summary.shape[:3]
    pages_per_program = _pages_per_program(num_pages, head_dim)
    grid = (-(-num_pages // pages_per_program), num_kv_heads, batch)
    state = (None, None, None, None, None)
    if update is not None:
        state = (update.key_cache, update.first, update.last, update.num_sealed, update.stale)
    keys, first, last, sealed, stale = state
    key_strides = (0, 0, 0) if keys is None else keys.stride()[:3]
    query_strides = (0, 0, 0) if query is None else query.stride()[:3]
    with on_device(page_summary):
        kernels.update_and_score[grid](
            keys, page_summary, first, last, sealed, stale, query, lengths.values, scores,
            *key_strides, *page_summary.stride()[:3], *query_strides,
            lengths.stride_b, lengths.stride_i, lengths.step, q_len, budget_tokens, max_seq_len,
            num_pages, **settings, UPDATE=update is not None,
            HAS_NEXT=sealed is not None and sealed.shape[0] == 2, D=head_dim,
            D_PAD=power_of_two(head_dim, 16), PAGE_SIZE=page_size,
            PAGE_TILE=page_tile(head_dim), PAGES_PER_PROGRAM=pages_per_program,
        )  # fmt: skip


def _pages_per_program(num_pages: int, head_dim: int) -> int:
    """Many programs for few pages; for many pages few, which share the look for stale ones."""
    tile = page_tile(head_dim)
    return max(tile, min(128, power_of_two(num_pages // 32)))
