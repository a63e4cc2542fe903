"""How much attention mass the pages hold that each page summary selects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quest_compile import ops

SUMMARIES: dict[str, dict[str, Any]] = {
    "minmax": {"summary": "minmax"},
    "minmax_int8": {"summary": "minmax_int8"},
    "meanstd": {"summary": "meanstd"},
    "sketch": {"summary": "sketch"},
    "sketch, 2 bits": {"summary": "sketch", "sketch_bits": 2},
}
PAGE_SIZE = 16


def page_scores(query: Tensor, keys: Tensor, settings: dict[str, Any]) -> Tensor:
    """[B, num_kv_heads, P] of queries [B, num_q_heads, 1, D] by the operators."""
    seq_lens = torch.tensor([keys.shape[2]])
    built = ops.build_page_summary(keys, seq_lens, **settings)
    rows, channel_scale = built if isinstance(built, tuple) else (built, None)
    return ops.score_pages(query, rows, seq_lens, channel_scale, **settings)


def bytes_per_page(head_dim: int, settings: dict[str, Any]) -> int:
    """Of 16-bit keys."""
    keys = torch.empty(1, 1, PAGE_SIZE, head_dim, dtype=torch.bfloat16)
    rows, _ = ops.empty_page_summary(keys, PAGE_SIZE, **settings)
    return rows[0, 0, 0].numel() * rows.element_size()


def mass_by_page(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of each query head [B, num_kv_heads, G, P], summed over pages."""
    grouped = query.unflatten(1, (keys.shape[1], -1)).squeeze(3)
    weights = (grouped @ keys.mT / math.sqrt(keys.shape[3])).softmax(-1)
    return weights.unflatten(-1, (-1, PAGE_SIZE)).sum(-1)


def mass_kept(heads: Iterable[tuple[Tensor, Tensor]], budgets: Sequence[int]) -> dict[str, Any]:
    """Mean attention mass in the best pages: summary -> one value per budget in pages."""
    kept: dict[str, list[list[float]]] = {}
    for query, keys in heads:
        mass = mass_by_page(query, keys)
        scores = {name: page_scores(query, keys, kind) for name, kind in SUMMARIES.items()}
        scores["oracle"] = mass.sum(2)
        for name, score in scores.items():
            values = []
            for budget in budgets:
                pages = score.topk(budget, -1).indices[:, :, None]
                taken = mass.gather(-1, pages.expand(-1, -1, mass.shape[2], -1)).sum(-1)
                values.append(taken.mean().item())
            kept.setdefault(name, []).append(values)
    return {name: torch.tensor(values).mean(0).tolist() for name, values in kept.items()}
