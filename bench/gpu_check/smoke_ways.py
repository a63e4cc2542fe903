"""The part of smoke.py about summaries other than min/max, and ways to select."""

from __future__ import annotations

from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.errors import relative_error
from quest_compile.ops import reference, reference_selection

PAGE_SIZE, BUDGET = 16, 96
PAGE_BUDGET = BUDGET // PAGE_SIZE
# Of shares: more than those leave of the longest row.
_CAP = 10
_SHARES: tuple[dict[str, float], ...] = ({"top_p": 0.6}, {"budget_fraction": 0.3})
Caches = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Found = list[tuple[str, float]]


def run_summary(
    source: Any, caches: Caches, written: torch.Tensor, seq_lens: torch.Tensor,
    mask: torch.Tensor | None, kind: dict[str, Any]
) -> Found:  # fmt: skip
    """Of another summary than min/max: its state is that of the reference, bit for bit."""
    query, keys, _ = caches
    end = f", {kind['summary']}"
    rows, channel_scale = _empty_summary(keys, kind)
    num_pages = int(written + 1) // PAGE_SIZE

    def new_state() -> list[Any]:
        num_sealed = torch.zeros(2, dtype=torch.int64)
        scale = None if channel_scale is None else torch.zeros_like(channel_scale)
        return [torch.zeros_like(rows), num_sealed, scale]

    def num_wrong(state: list[Any]) -> float:
        wrong = (state[0] != expected[0])[:, :, :num_pages].sum()
        return float(wrong if state[2] is None else wrong + (state[2] != expected[2]).sum())

    expected, state = new_state(), new_state()
    reference.update_page_summary(keys, written, *expected, **kind)
    source.update_page_summary(keys, written, *state, **kind)
    found = [(f"update_page_summary{end}", num_wrong(state))]
    rows, _, scale = expected
    of_tokens = {"attn_mask": mask} if kind["summary"] == "sketch" else {}
    scores = source.score_pages(query, rows, seq_lens, scale, **of_tokens, **kind)
    right = reference.score_pages(query, rows, seq_lens, scale, **of_tokens, **kind)
    found.append((f"score_pages{end}", relative_error(scores, right)))
    pages = reference.select_pages(scores, seq_lens, mask, page_budget=PAGE_BUDGET)
    right, _ = reference.attend_pages(*caches, pages, seq_lens, mask)
    state = new_state()
    out = source.sparse_decode_step(
        *caches, written, *state[:2], seq_lens, mask, state[2], budget=BUDGET, **kind
    )
    found.append((f"sparse_decode_step{end}", relative_error(out, right)))
    found.append((f"sparse_decode_step state{end}", num_wrong(state)))
    return found


def run_shares(
    source: Any, caches: Caches, rows: torch.Tensor, seq_lens: torch.Tensor,
    mask: torch.Tensor | None
) -> Found:  # fmt: skip
    """top_p and budget_fraction: pages are those of the reference by the scores of ``source``."""
    query, keys, _ = caches
    scores = source.score_pages(query, rows, seq_lens)
    group_size, head_dim = query.shape[1] // keys.shape[1], query.shape[3]
    score_scale = reference_selection.score_scale_of(group_size, head_dim)
    found = []
    for shares in _SHARES:
        choice: dict[str, Any] = {"page_budget": _CAP, "score_scale": score_scale, **shares}
        right = reference.select_pages(scores, seq_lens, mask, **choice)
        pages = source.select_pages(scores, seq_lens, mask, **choice)
        out = source.sparse_decode(*caches, rows, seq_lens, mask, budget=_CAP * PAGE_SIZE, **shares)
        expected, _ = reference.attend_pages(*caches, right, seq_lens, mask)
        (name,) = shares
        found.append((f"select_pages, {name}", float((pages != right).sum())))
        found.append((f"sparse_decode, {name}", relative_error(out, expected)))
    return found


def _empty_summary(keys: torch.Tensor, kind: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    return ops.empty_page_summary(keys, **kind)
