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


def run_stored_scores(source: Any, caches: Caches, length: int) -> Found:
    """select_every: a step that scores, one that does not, and one that has to, as keys changed."""
    query, keys, values = caches[0], caches[1].clone(), caches[2].nan_to_num(0)
    kind = {"summary": "minmax"}
    states = []
    for _ in range(2):
        rows, _ = _empty_summary(keys, kind)
        sealed = torch.tensor([0, -1])
        scores, scored_at = ops.empty_page_scores(keys, keys.shape[1])
        states.append((rows.fill_(0), sealed, scores.fill_(0), scored_at))
    worst = {"output": 0.0, "scores": 0.0, "scored at": 0.0}
    for i in range(3):
        if i == 2:
            keys[1, 1] *= -2
        seq_lens = torch.tensor([length + i])
        outs = []
        for by, (rows, sealed, scores, scored_at) in zip((source, reference), states, strict=True):
            outs.append(
                by.sparse_decode_step(
                    query, keys, values, seq_lens - 1, rows, sealed, seq_lens, None, None, scores,
                    scored_at, select_every=100, budget=BUDGET
                )
            )  # fmt: skip
        (*_, scores, scored_at), (*_, right_scores, right_scored_at) = states
        pages = reference.select_pages(scores, seq_lens, None, page_budget=PAGE_BUDGET)
        right, _ = reference.attend_pages(query, keys, values, pages, seq_lens)
        errors = (
            relative_error(outs[0], right),
            relative_error(scores, right_scores),
            float((scored_at != right_scored_at).sum()),
        )
        for name, error in zip(worst, errors, strict=True):
            worst[name] = max(worst[name], error)
    end = ", select_every"
    return [
        (f"sparse_decode_step{end}", worst["output"]),
        (f"sparse_decode_step state{end}", max(worst["scores"], worst["scored at"])),
    ]


def _empty_summary(keys: torch.Tensor, kind: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    return ops.empty_page_summary(keys, **kind)
