"""Scores of pages by each summary, through the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest_compile import ops

PAGE_SIZE = 16
SUMMARIES: dict[str, dict[str, Any]] = {
    "minmax": {"summary": "minmax"},
    "sketch": {"summary": "sketch"},
    "sketch, 2 bits": {"summary": "sketch", "sketch_bits": 2},
}
# The same sketches, a page being worth its best token instead of the log-sum-exp of all.
MAXIMUM = {"sketch, maximum": "sketch", "sketch, 2 bits, maximum": "sketch, 2 bits"}
# The log-sum-exp of logits so many times as large, divided by that, is their maximum but for
# log(PAGE_SIZE) / SHARPNESS.
SHARPNESS = 1000.0


def page_scores(query: Tensor, keys: Tensor, name: str, seq_len: int | None = None) -> Tensor:
    """[B, num_kv_heads, P] of queries [B, num_q_heads, 1, D] and keys [B, num_kv_heads, T, D].

    ``name``: of SUMMARIES or MAXIMUM; ``seq_len``: T if None.
    """
    settings = SUMMARIES[MAXIMUM.get(name, name)]
    seq_lens = torch.tensor([keys.shape[2] if seq_len is None else seq_len])
    built = ops.build_page_summary(keys, seq_lens, **settings)
    rows, channel_scale = built if isinstance(built, tuple) else (built, None)
    if name in MAXIMUM:
        settings = settings | {"scale": SHARPNESS * keys.shape[3] ** -0.5}
    return ops.score_pages(query, rows, seq_lens, channel_scale, **settings)


def bytes_per_page(head_dim: int, name: str) -> int:
    """Of 16-bit keys."""
    keys = torch.empty(1, 1, PAGE_SIZE, head_dim, dtype=torch.bfloat16)
    rows, _ = ops.empty_page_summary(keys, PAGE_SIZE, **SUMMARIES[name])
    return rows[0, 0, 0].numel() * rows.element_size()
