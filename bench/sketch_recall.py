"""Answers of the recall model, and the attention mass kept, by summary and budget."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quest_compile.bench.options import INTERRUPTED
from quest_compile.bench.sketch_scores import MAXIMUM, SUMMARIES, page_scores
from quest_compile.eval import baselines
from quest_compile.eval.cli import main as evaluate
from quest_compile.eval.statistics import design_effect, wilson_interval

# Only the open page is kept besides those that were chosen. Audits tell the attention mass.
_SETTINGS = {"num_sink_pages": 0, "num_recent_pages": 1, "audit": 1}


def measure_recall(
    num_tokens: int, num_records: int, samples: int, budgets: Sequence[int], folder: Path
) -> dict[str, Any]:
    """Share of right answers with its 95 % interval, for each summary and budget.

    Summaries decode with compiled graphs, "maximum" and the oracle with plain torch over the pages
    chosen. ``mass_kept``: mean over the decode steps, questions included, and over query heads.
    """
    names = {"dense": "dense", "oracle": "oracle"} | _register_maximum()
    for name, settings in SUMMARIES.items():
        given = ",".join(f"{k}={v}" for k, v in (settings | _SETTINGS).items())
        names[f"quest:{given}"] = name
    command = ["recall", "--tasks", f"recall-{num_records}", "--lengths", str(num_tokens)]
    command += ["--samples", str(samples), "--budgets", *map(str, budgets)]
    if status := evaluate([*command, "--out", str(folder), "--resume", "--methods", *names]):
        raise KeyboardInterrupt if status == INTERRUPTED else SystemExit(status)
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in map(json.loads, (folder / "records.jsonl").read_text().splitlines()):
        if "cell" in line:
            *_, method, budget = line["cell"]
            cells.setdefault((names[method], budget), []).append(line)
    rows = [{"method": m, "budget": b, **_summed_up(lines)} for (m, b), lines in cells.items()]
    return {"tokens": num_tokens, "records": num_records, "rows": rows}


def _register_maximum() -> dict[str, str]:
    """Methods of the evaluation that score a page by its best token: their names, and ours."""
    registered = {}
    for name in MAXIMUM:
        method = name.replace(", ", "-").replace(" ", "-")
        baselines.KEEP[method] = _keep_best(name)
        registered[method] = name
    return registered


def _keep_best(name: str) -> baselines.Keep:
    def keep(step: baselines.Step) -> Tensor:
        scores = page_scores(step.query, step.key, name, step.seq_len)
        return baselines.keep_best_pages(step, scores)

    return keep


def _summed_up(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Questions about one context are not independent: they count for less, as in eval."""
    scores = [score for line in lines for per in line["scores"] for score in per]
    contexts = [line["cell"][2] for line in lines for per in line["scores"] for _ in per]
    right, effect = statistics.fmean(scores), design_effect(scores, contexts)
    low, high = wilson_interval(right, len(scores) / effect)
    masses = [line["activity"]["mass_kept"] for line in lines]
    return {
        "right": right,
        "low": low,
        "high": high,
        "questions": len(scores),
        "mass_kept": None if None in masses else statistics.fmean(masses),
        "implementation": lines[-1]["implementation"],
    }
