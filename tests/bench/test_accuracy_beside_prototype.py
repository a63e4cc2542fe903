"""The result on record beside the figures of a prototype: within sampling error."""

import json
import math
from pathlib import Path

from quest_compile.eval.statistics import wilson_interval

ROOT = Path(__file__).resolve().parents[2]
RESULT = "2026-11-24_epyc-avx2-2-cores_e311a7e_eval-recall"
PROTOTYPE = json.loads((ROOT / "tests/accuracy_prototype.json").read_text())
ROWS = {
    (row["task"], row["method"], row["budget"]): row
    for row in json.loads((ROOT / f"bench/results/{RESULT}.json").read_text())["rows"]
}
TASKS = ("recall-64", "recall-16")
OTHERS_QUESTIONS, OTHERS_PER_CONTEXT = 64, 16
BASE = "quest:num_sink_pages=0,num_recent_pages=1"


def interval(row, theirs, clustered=True):
    """95 % interval of ours minus theirs, of independent proportions (Newcombe's method 10).

    Samples are divided by the design effect, theirs by that of contexts of their size.
    """
    effect = row["comparison"]["design_effect"] if clustered else 1
    num_samples = row["comparison"]["num_samples"]
    correlation = (effect - 1) / (num_samples / row["num_contexts"] - 1)
    others_effect = 1 + (OTHERS_PER_CONTEXT - 1) * correlation
    low, high = wilson_interval(row["value"], num_samples / effect)
    others_low, others_high = wilson_interval(theirs, OTHERS_QUESTIONS / others_effect)
    difference = row["value"] - theirs
    return (
        difference - math.hypot(row["value"] - low, others_high - theirs),
        difference + math.hypot(high - row["value"], theirs - others_low),
    )


def apart(clustered=True, ours=lambda method: method):
    """Cells whose interval does not hold 0; ``ours``: whose rows stand beside a method's."""
    found = []
    for task in TASKS:
        for method, values in PROTOTYPE[task].items():
            for budget, theirs in zip(PROTOTYPE["budgets"], values, strict=True):
                low, high = interval(ROWS[task, ours(method), budget], theirs / 100, clustered)
                if not low <= 0 <= high:
                    found.append((task, method, budget))
    return found


def test_every_figure_of_the_prototype_is_reproduced_within_sampling_error():
    assert apart() == []


def test_only_snapkv_needs_the_clustering_of_questions_for_that():
    assert {method for _, method, _ in apart(clustered=False)} == {"snapkv"}
    assert len(apart(clustered=False)) == 4


def test_a_method_that_is_another_would_show():
    """The default settings, which attend a sink and a second recent page, are another method."""
    found = apart(ours=lambda method: "quest" if method == BASE else method)
    assert {(task, budget) for task, _, budget in found} == {("recall-64", 64), ("recall-16", 64)}
