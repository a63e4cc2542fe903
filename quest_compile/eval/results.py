"""From records to a table: one row per task, length, method and budget, each with its verdict."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Hashable
from typing import Any

from quest_compile.eval.losses import compare_losses
from quest_compile.eval.methods import DENSE
from quest_compile.eval.records import Cell
from quest_compile.eval.samples import COPY, PERPLEXITY
from quest_compile.eval.statistics import INCONCLUSIVE, Comparison, compare

BY_CONSTRUCTION = "dense by construction"
DENSE_FAILS = "dense fails the task: nothing to lose"
# Mean score of dense below which a task says nothing.
LEAST_DENSE_SCORE = 0.1
# Tokens of one run of the bootstrap over losses.
RUN_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Row:
    """``comparison`` with dense, on the contexts both have; None for dense itself.

    ``value``: mean score, or mean loss in nats per token. ``same_as_dense``: share of answers with
    the very tokens of dense decoding. ``kl``: nats per token from dense. The rest adds up what the
    records have: steps, sparse ones, tokens read per query. ``implementation``: what served it.
    ``conditions``: numbers of those under which it was measured. ``loss`` and ``loss_comparison``:
    of copy, whose ``value`` is a score.
    """

    task: str
    length: int
    method: str
    budget: int | float
    kind: str
    implementation: str
    num_contexts: int
    context_tokens: float
    value: float
    verdict: str
    comparison: Comparison | None
    same_as_dense: float | None
    kl: float | None
    steps: int
    sparse_steps: int
    tokens_read: float | None
    most_tokens_read: int | None
    mass_kept: float | None
    conditions: tuple[int, ...]
    loss: float | None = None
    loss_comparison: Comparison | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def rows_of(lines: dict[Cell, dict[str, Any]], margin: float, loss_margin: float) -> list[Row]:
    """Rows in the order in which they were measured; ``margin`` of scores, and of losses."""
    by_row: dict[Cell, list[int]] = {}
    for cell in lines:
        by_row.setdefault(cell._replace(context=0), []).append(cell.context)
    return [_row(key, numbers, lines, margin, loss_margin) for key, numbers in by_row.items()]


def _row(
    key: Cell,
    numbers: list[int],
    lines: dict[Cell, dict[str, Any]],
    margin: float,
    loss_margin: float,
) -> Row:
    dense_key = key._replace(method=DENSE, budget=0)
    numbers = [n for n in numbers if dense_key._replace(context=n) in lines]
    own = [lines[key._replace(context=n)] for n in numbers]
    dense = [lines[dense_key._replace(context=n)] for n in numbers]
    activity = [line["activity"] for line in own]
    sparse_steps = sum(a["sparse_steps"] for a in activity)
    kind = own[0]["kind"]
    comparison, loss_comparison, verdict = None, None, "reference"
    if key.method != DENSE:
        if kind == PERPLEXITY:
            comparison = compare_losses(_runs_of_differences(own, dense), loss_margin)
        else:
            comparison = compare(*paired_scores(own, dense, numbers, kind), margin)
        if kind == COPY:
            loss_comparison = compare_losses(_runs_of_differences(own, dense), loss_margin)
        verdict = _verdict(comparison, kind, sparse_steps)
    divergences = [kl for line in own for kl in line.get("kl", [])]
    most = [a["most_tokens_read"] for a in activity if a["most_tokens_read"] is not None]
    return Row(
        task=key.task,
        length=key.length,
        method=key.method,
        budget=key.budget,
        kind=kind,
        implementation=own[-1]["implementation"],
        num_contexts=len(own),
        context_tokens=statistics.fmean(line["context_tokens"] for line in own),
        value=_mean(own, "losses" if kind == PERPLEXITY else "scores"),
        verdict=verdict,
        comparison=comparison,
        same_as_dense=_same_tokens(own, dense),
        kl=statistics.fmean(divergences) if divergences else None,
        steps=sum(a["steps"] for a in activity),
        sparse_steps=sparse_steps,
        tokens_read=_weighted_mean(activity, "tokens_read"),
        most_tokens_read=max(most) if most else None,
        mass_kept=_weighted_mean(activity, "mass_kept"),
        conditions=tuple(sorted({line["conditions"] for line in own})),
        loss=_mean(own, "losses") if kind == COPY else None,
        loss_comparison=loss_comparison,
    )


def _mean(lines: list[dict], name: str) -> float:
    return statistics.fmean(value for line in lines for per in line[name] for value in per)


def _verdict(comparison: Comparison, kind: str, sparse_steps: int) -> str:
    if not sparse_steps:
        return BY_CONSTRUCTION
    if kind != PERPLEXITY and comparison.dense < LEAST_DENSE_SCORE:
        return DENSE_FAILS
    if comparison.verdict == INCONCLUSIVE:
        return f"{INCONCLUSIVE}: {comparison.num_needed} samples needed"
    return comparison.verdict


def paired_scores(
    own: list[dict], dense: list[dict], numbers: list[int], kind: str
) -> tuple[list[float], list[float], list[Hashable]]:
    """With what each belongs to: its context, or the passage of copy, whose tokens are samples."""
    pairs = [
        (d, o, (number, i) if kind == COPY else number)
        for number, line, reference in zip(numbers, own, dense)
        for i, (mine, theirs) in enumerate(zip(line["scores"], reference["scores"]))
        for o, d in zip(mine, theirs)
    ]
    scores_dense, scores_own, contexts = zip(*pairs)
    return list(scores_dense), list(scores_own), list(contexts)


def _runs_of_differences(own: list[dict], dense: list[dict]) -> list[list[float]]:
    runs = []
    for line, reference in zip(own, dense):
        for mine, theirs in zip(line["losses"], reference["losses"]):
            differences = [a - b for a, b in zip(mine, theirs)]
            for start in range(0, len(differences), RUN_LENGTH):
                runs.append(differences[start : start + RUN_LENGTH])
    return runs


def _same_tokens(own: list[dict], dense: list[dict]) -> float | None:
    same = [
        mine == theirs
        for line, reference in zip(own, dense)
        for mine, theirs in zip(line.get("tokens", []), reference.get("tokens", []))
    ]
    return statistics.fmean(same) if same else None


def _weighted_mean(activity: list[dict], name: str) -> float | None:
    """Over steps that left something out."""
    found = [(a[name], a["sparse_steps"]) for a in activity if a[name] is not None]
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else None
