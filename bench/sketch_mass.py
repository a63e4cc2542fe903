"""How much attention mass the pages hold that each page summary selects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quest_compile.bench.sketch_scores import MAXIMUM, PAGE_SIZE, SUMMARIES, page_scores


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
        scores = {name: page_scores(query, keys, name) for name in (*SUMMARIES, *MAXIMUM)}
        scores["oracle"] = mass.sum(2)
        for name, score in scores.items():
            values = []
            for budget in budgets:
                pages = score.topk(budget, -1).indices[:, :, None]
                taken = mass.gather(-1, pages.expand(-1, -1, mass.shape[2], -1)).sum(-1)
                values.append(taken.mean().item())
            kept.setdefault(name, []).append(values)
    return {name: torch.tensor(values).mean(0).tolist() for name, values in kept.items()}
