"""The tables of docs/accuracy.md say what the JSON on record says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
ANSWERS = "2026-11-24_epyc-avx2-2-cores_e311a7e_eval-recall.json"
# Record -> labels and budgets of its table.
COPIES = {
    "2026-11-28_epyc-avx2-2-cores_7ba9e2f_eval-smollm2-copy.json": (1, (128, 256, 512)),
    "2026-11-28_epyc-avx2-2-cores_1670863_eval-smollm2-copy.json": (2, (128, 256)),
    "2026-11-28_epyc-avx2-2-cores_5fd5192_eval-smollm2-copy.json": (2, (256, 512)),
}
TEXT = (ROOT / "docs" / "accuracy.md").read_text("utf-8")

# Label -> method on record, whose settings have the defaults of its commit.
METHODS = {
    'quest, `summary="minmax", group_reduce="sum"`': "quest",
    "the same, only the newest page always attended": "quest:num_sink_pages=0,num_recent_pages=1",
    'quest, `preset="paper"`': "quest:num_sink_pages=0,num_recent_pages=1,group_reduce=none",
    "random pages": "random",
    "the default": "quest",
    '`preset="paper"`': "quest:preset=paper",
    '`summary="minmax"`, `group_reduce="sum"`': "quest",
    '`summary="minmax"`, `group_reduce="none"`': "quest:group_reduce=none",
}


def load(name):
    return json.loads((RESULTS / name).read_text("utf-8"))


def table(header):
    """The rows of cells below the table row that begins with ``header``; header first."""
    lines = TEXT.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {header} |")]
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines[start:end]]
    return [rows[0], *rows[2:]]


def test_answers_of_the_recall_model():
    rows = {
        (row["method"], row["budget"]): row
        for row in load(ANSWERS)["rows"]
        if row["task"] == "recall-64"
    }
    assert f"{100 * rows['dense', 0]['value']:.1f}" == "97.8"
    assert {row["comparison"]["num_samples"] for row in rows.values() if row["comparison"]} == {320}
    (_, *budgets), *body = table("64 records, 320 questions, dense 97.8 | 64")
    assert len(body) == 8
    for label, *cells in body:
        for budget, cell in zip(budgets, cells, strict=True):
            row = rows[METHODS.get(label, label), int(budget)]
            assert cell == f"{100 * row['value']:.1f}", (label, budget)


@pytest.mark.parametrize("record", COPIES)
def test_copying_of_a_really_trained_model(record):
    rows = {(row["method"], row["budget"]): row for row in load(record)["rows"]}
    dense = rows["dense", 0]
    right, loss = f"{100 * dense['value']:.1f}", f"{dense['loss']:.2f}"
    num_labels, budgets = COPIES[record]
    num_passages = 3 * dense["num_contexts"]
    columns = " | ".join(map(str, budgets))
    _, *body = table(f"copy, {num_passages} passages, dense {right} %, loss {loss} | {columns}")
    assert len(body) == num_labels
    for label, *cells in body:
        for budget, cell in zip(budgets, cells, strict=True):
            row = rows[METHODS[label], budget]
            low, high = (100 * row["comparison"][end] for end in ("low", "high"))
            found = f"{100 * row['value']:.1f} ({low:+.0f} to {high:+.0f}), {row['loss']:.2f}"
            assert cell == found, (label, budget)


@pytest.mark.parametrize("record", [ANSWERS, *COPIES])
def test_the_document_names_the_record(record):
    assert f"bench/results/{record.removesuffix('.json')}" in TEXT
