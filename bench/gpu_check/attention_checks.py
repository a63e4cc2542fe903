"""Is a method of attention.py right? Only then it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quest_compile.bench.gpu_check.inputs import Inputs, Workload
from quest_compile.ops import reference
from quest_compile.ops.reference_summaries import page_rows


def scores_of(f: Any, x: Inputs, summary: str) -> torch.Tensor:
    """What the operators of ``f`` make of this summary."""
    state = x.states[summary]
    kind = {} if summary == "minmax" else {"summary": summary}
    return f.score_pages(x.query, state.rows, state.seq_lens, state.channel_scale, **kind)


def expected_of(
    x: Inputs, workload: Workload, f: Any, summaries: Sequence[str]
) -> dict[str, torch.Tensor]:
    """By method of the operators of ``f``, of the first row; outputs and scores in float32."""
    row = slice(0, 1)
    query, keys, values = (t[row].float() for t in (x.query, x.key_cache, x.value_cache))
    limits = {"page_budget": workload.budget // 16}

    def select(scores: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        arguments = (scores[row].cpu(), seq_lens.cpu(), x.attn_mask.cpu())
        return reference.select_pages(*arguments, **limits).to(scores.device)

    def over(pages: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        if workload.context <= workload.budget:
            return reference.dense_decode(query, keys, values, seq_lens)
        return reference.attend_pages(query, keys, values, pages[row], seq_lens)[0]

    expected = {"dense": reference.dense_decode(query, keys, values, x.seq_lens)}
    expected["select_pages"] = select(x.scores, x.seq_lens)
    expected["attend_pages"] = over(x.pages, x.seq_lens)
    for summary in summaries:
        state = x.states[summary]
        scale = None if state.channel_scale is None else state.channel_scale[row]
        arguments = (x.query[row], state.rows[row], state.seq_lens, scale)
        end = "" if summary == "minmax" else f", {summary}"
        expected[f"score_pages{end}"] = reference.score_pages(*arguments, summary=summary)
        # Scores near each other may change places: the pages are those of the kernel's own.
        pages = select(scores_of(f, x, summary), state.seq_lens)
        expected[f"sparse_decode_step{end}"] = over(pages, state.seq_lens)
    return expected


def error_of(
    name: str, call: Callable[[Inputs], Any], x: Inputs, expected: dict[str, torch.Tensor]
) -> str:
    """Why this method is not timed; empty if it is right. Peers are named as ours or are dense."""
    stem, _, summary = name.partition(", ")
    try:
        if stem == "update_page_summary":
            return _error_of_update(call, x, summary or "minmax")
        wanted = expected.get(name, expected.get(stem, expected["dense"]))
        out = call(x)
        out = out[0] if isinstance(out, tuple) else out
        if name == "select_pages":
            return "" if torch.equal(out[:1], wanted) else "other pages"
        out = out.reshape(out.shape[0], *wanted.shape[1:])[: wanted.shape[0]].float()
        finite = wanted.isfinite()
        difference = (out[finite] - wanted.float()[finite]).abs().max()
        size = wanted.float()[finite].abs().max()
        is_right = bool(difference <= 0.02 * size) and torch.equal(out.isfinite(), finite)
        return "" if is_right else f"differs by {float(difference / size):.3g} of the largest"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _error_of_update(call: Callable[[Inputs], Any], x: Inputs, summary: str) -> str:
    """Does it find that the last sealed page has another row than its keys say?"""
    state = x.states[summary]
    page = int(state.num_sealed[0]) - 1
    keys = x.key_cache[:, :, page * 16 : (page + 1) * 16].unsqueeze(2).cpu()
    scale = None if state.channel_scale is None else state.channel_scale.cpu()
    before = state.rows[:, :, page].clone()
    state.rows[:, :, page] = 0
    try:
        call(x)
        # On CUDA tensors the reference has other bits (on_device.py).
        right = page_rows(keys, summary, scale, 1)[:, :, 0]
        return "" if torch.equal(state.rows[:, :, page].cpu(), right) else "another row"
    finally:
        state.rows[:, :, page] = before
