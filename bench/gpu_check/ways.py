"""A sparse step with each way to select side by side, by the kernels that serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench.gpu_check.each_workload import measure_each
from quest_compile.bench.gpu_check.errors import relative_error
from quest_compile.bench.gpu_check.inputs import Inputs, Workload
from quest_compile.bench.gpu_check.record import Record, StepFailedError
from quest_compile.bench.gpu_check.timing import median_seconds
from quest_compile.ops import reference, reference_selection

_EVERY = 4
# Settings of a step.
_WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "meanstd": {"summary": "meanstd"},
    "top_p": {"top_p": 0.9},
    "budget_fraction": {"budget_fraction": 1 / 64},
}


def run_ways(record: Record, device: str, workloads: list[Workload]) -> None:
    """A row per way; one that attends other pages than select_pages chooses fails the step."""
    served = "cpu" if device == "cpu" else ops.provider_of("sparse_decode_step")
    wrong: list[str] = []

    def measure(workload: Workload, copies: list[Inputs]) -> None:
        wrong.extend(compare_ways(record, workload, copies, served))

    measure_each(record, device, workloads, measure)
    if wrong:
        raise StepFailedError("; ".join(wrong)[:400])


def compare_ways(
    record: Record, workload: Workload, copies: list[Inputs], served: str
) -> list[str]:
    """Which ways are wrong; only the others are timed."""
    wrong = []
    calls = {way: (_step(workload, **settings), 1) for way, settings in _WAYS.items()}
    calls[f"select_every, mean of {_EVERY} steps"] = (_Run(workload, copies), _EVERY)
    for way, (call, num_steps) in calls.items():
        row: dict[str, Any] = {"workload": workload.name, "way": way, "kernels": served}
        pages, seq_lens = _pages_of(way, workload, copies[0])
        if why := _why_wrong(call, copies[0], pages, seq_lens):
            wrong.append(f"{workload.name} {way}: {why}")
            record.add(**row, refused=why)
            continue
        num_pages = float((pages >= 0).sum(-1).float().mean())
        seconds = median_seconds(call, copies) / num_steps
        record.add(**row, pages=num_pages, us=1e6 * seconds)
    return wrong


def _why_wrong(
    call: Callable[[Inputs], torch.Tensor], x: Inputs, pages: torch.Tensor, seq_lens: torch.Tensor
) -> str:
    query, keys, values = (t[:1].float() for t in (x.query, x.key_cache, x.value_cache))
    right, _ = reference.attend_pages(query, keys, values, pages[:1], seq_lens)
    try:
        error = relative_error(call(x)[:1], right)
    except Exception as error_of_call:
        return f"{type(error_of_call).__name__}: {error_of_call}".splitlines()[0][:120]
    if not error < 0.02:
        return f"differs by {error:.3g} of the largest"
    return call.why_wrong(x) if isinstance(call, _Run) else ""


def _step(workload: Workload, **settings: Any) -> Callable[[Inputs], torch.Tensor]:
    def call(x: Inputs) -> torch.Tensor:
        state = x.states[settings.get("summary", "minmax")]
        caches = (x.query, x.key_cache, x.value_cache, state.cache_position, state.rows)
        lens = (state.num_sealed, state.seq_lens, x.attn_mask)
        return ops.sparse_decode_step(*caches, *lens, budget=workload.budget, **settings)

    return call


class _Run:
    """The steps between two that score, the first of them included, at lengths before the last."""

    def __init__(self, workload: Workload, copies: list[Inputs]) -> None:
        self._budget, self._first = workload.budget, workload.context - _EVERY
        device = copies[0].query.device
        self._seq_lens = [torch.tensor([self._first + i], device=device) for i in range(_EVERY)]
        self._positions = [seq_lens - 1 for seq_lens in self._seq_lens]
        self._states = {id(x): self._new_state(x, workload) for x in copies}

    def _new_state(self, x: Inputs, workload: Workload) -> tuple[torch.Tensor, ...]:
        rows = x.states["minmax"].rows.clone()
        num_sealed = torch.full_like(x.states["minmax"].num_sealed, (self._first - 1) // 16)
        return rows, num_sealed, *ops.empty_page_scores(x.key_cache, workload.layer.num_kv_heads)

    def __call__(self, x: Inputs) -> torch.Tensor:
        rows, num_sealed, scores, scored_at = self._states[id(x)]
        for position, seq_lens in zip(self._positions, self._seq_lens, strict=True):
            out = ops.sparse_decode_step(
                x.query, x.key_cache, x.value_cache, position, rows, num_sealed, seq_lens,
                x.attn_mask, None, scores, scored_at, select_every=_EVERY, budget=self._budget
            )  # fmt: skip
        return out

    def why_wrong(self, x: Inputs) -> str:
        """The query being the same, outputs do not tell which steps scored."""
        *_, scored_at = self._states[id(x)]
        found, wanted = scored_at.tolist(), [self._first, self._first + _EVERY - 1]
        return "" if found == wanted else f"scored_at is {found} in place of {wanted}"


def _pages_of(way: str, workload: Workload, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What a call of this way attends last, and at which length."""
    settings = _WAYS.get(way)
    scored = x.seq_lens - (0 if settings is not None else _EVERY)
    selected = x.seq_lens - (0 if settings is not None else 1)
    shares = dict(settings or {})
    summary = shares.pop("summary", "minmax")
    scores = ops.score_pages(x.query, x.states[summary].rows, scored, summary=summary)
    if "top_p" in shares:
        group_size = x.query.shape[1] // x.key_cache.shape[1]
        shares["score_scale"] = reference_selection.score_scale_of(group_size, x.query.shape[3])
    page_budget = workload.budget // 16
    return ops.select_pages(scores, selected, page_budget=page_budget, **shares), selected
