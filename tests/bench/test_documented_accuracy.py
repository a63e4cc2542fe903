"""The tables of accuracy and of ways to select in the documents say what the JSON on record says.

Figures of a prototype beside them: test_accuracy_beside_prototype.py."""

import json
import re
from pathlib import Path

import pytest

from quest_compile.bench.report.tables import select, whole
from quest_compile.bench.results import load_results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
ANSWERS = "2026-11-24_epyc-avx2-2-cores_e311a7e_eval-recall.json"
COPIES = "2026-11-28_epyc-avx2-2-cores_5fd5192_eval-smollm2-copy.json"
LONG_ANSWERS = "2026-11-24_epyc-avx2-2-cores_0aee0ae_eval-recall-8192.json"
SELECTION = "2026-11-24_epyc-2-cores_9b1ef62_eval-recall-selection.json"
SKETCHES = "2026-11-24_epyc-2-cores_50fca43_sketch-accuracy.json"
BUDGETS = "2026-11-24_epyc-2-cores_f430b31_ops-budgets"

ACCURACY, WAYS = "docs/accuracy.md", "docs/selection.md"
NO_TIMES = "It has no result on record yet."

NEWEST_ONLY = "quest:num_sink_pages=0,num_recent_pages=1"
METHODS = {
    "Quest": "quest",
    "StreamingLLM": "streaming",
    "quest (1 sink page, 2 recent pages)": "quest",
    "quest, only the newest page always attended": NEWEST_ONLY,
    "the same, per query head (the paper)": f"{NEWEST_ONLY},group_reduce=none",
    "the same, maximum over the group": f"{NEWEST_ONLY},group_reduce=max",
    "random pages": "random",
    "quest, each query head for itself": "quest:group_reduce=none",
    'quest, `summary="sketch"`': "quest:summary=sketch",
    # docs/selection.md
    "default": "quest",
    "oracle: the pages with the most attention": "oracle",
    "0.03125 of the context": "quest:budget=0.03125",
    "0.0625 of the context": "quest:budget=0.0625",
    "no dense layers; 512, 512, 128 by layer": "quest:num_dense_layers=0,budget=0:512/1:512/2:128",
    "no dense layers; 128, 128, 512 by layer": "quest:num_dense_layers=0,budget=0:128/1:128/2:512",
}
SKETCH_ROWS = {
    "min/max": "minmax",
}


def load(name):
    return json.loads((RESULTS / name).read_text("utf-8"))


def table(document, header):
    """The rows of cells below the table row that begins with ``header``; header first."""
    lines = (ROOT / document).read_text("utf-8").splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {header} |")]
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines[start:end]]
    return [rows[0], *rows[2:]]


def method_of(label):
    """``quest:...`` of a row whose label is the settings themselves, in the order of the JSON."""
    if label in METHODS or "=" not in label:
        return METHODS.get(label, label)
    parts = label.replace("`", "").replace('"', "").split(", ")
    return "quest:" + ",".join(sorted(parts, key=lambda part: not part.startswith("summary")))


def right(rows, task, method, budget):
    """Right answers in %, and tokens read."""
    (row,) = [
        row for row in rows if (row["task"], row["method"], row["budget"]) == (task, method, budget)
    ]
    return 100 * row["value"], row["tokens_read"]


@pytest.mark.parametrize(
    ("document", "header", "task", "questions", "dense", "num_rows"),
    [
        ("README.md", "budget | 64 | 128 | 256 | 512 | 1024 | dense", "recall-64", 320, 97.8, 2),
        (ACCURACY, "64 records, 320 questions, dense 97.8 | 64", "recall-64", 320, 97.8, 9),
        (ACCURACY, "16 records, 64 questions, dense 100 | 64", "recall-16", 64, 100, 9),
    ],
)
def test_answers_of_the_recall_model(document, header, task, questions, dense, num_rows):
    rows = load(ANSWERS)["rows"]
    assert f"{right(rows, task, 'dense', 0)[0]:.1f}" == f"{dense:.1f}"
    compared = [row["comparison"] for row in rows if row["task"] == task and row["comparison"]]
    assert {found["num_samples"] for found in compared} == {questions}
    (_, *budgets), *body = table(document, header)
    assert len(body) == num_rows
    for label, *cells in body:
        for budget, cell in zip(budgets, cells):
            of = ("dense", 0) if budget == "dense" else (method_of(label), int(budget))
            if cell or budget != "dense":
                assert f"{float(cell):.1f}" == f"{right(rows, task, *of)[0]:.1f}", (label, budget)


def test_copying_of_a_really_trained_model():
    rows = {(row["method"], row["budget"]): row for row in load(COPIES)["rows"]}
    dense = rows["dense", 0]
    right, loss = f"{100 * dense['value']:.1f}", f"{dense['loss']:.2f}"
    _, *body = table(ACCURACY, f"copy, 3 passages, dense {right} %, loss {loss} | 256 | 512")
    assert len(body) == 3
    for label, *cells in body:
        for budget, cell in zip((256, 512), cells):
            row = rows[METHODS[label], budget]
            low, high = (100 * row["comparison"][end] for end in ("low", "high"))
            found = f"{100 * row['value']:.1f} ({low:+.0f} to {high:+.0f}), {row['loss']:.2f}"
            assert cell == found, (label, budget)


@pytest.mark.parametrize(
    ("document", "record"),
    [
        (ACCURACY, ANSWERS),
        (ACCURACY, COPIES),
        (WAYS, SELECTION),
        (WAYS, SKETCHES),
        ("docs/page_sketches.md", SKETCHES),
    ],
)
def test_documents_name_the_record(document, record):
    text = (ROOT / document).read_text("utf-8")
    assert f"bench/results/{record.removesuffix('.json')}" in text


def shows_times(text, folders):
    """Is ``text`` with the marked table of one of ``folders``, or says that there is none?"""
    named = re.findall(r"<!-- bench: selection bench/results/(\S+) -->", text)
    if not folders:
        return not named and NO_TIMES in text
    return len(named) == 1 and named[0] in folders and NO_TIMES not in text


def test_times_of_ways_to_select_are_the_record_or_said_to_be_missing():
    """The marked table itself: test_results_on_record.py."""
    folders = [path.name for path in RESULTS.glob("*_selection") if path.is_dir()]
    assert shows_times((ROOT / WAYS).read_text("utf-8"), folders)


def test_that_check_finds_what_is_wrong():
    right, other = (f"<!-- bench: selection bench/results/{x}_selection -->" for x in "xy")
    assert shows_times(NO_TIMES, []) and shows_times(right, ["x_selection"])
    assert not any(shows_times(text, []) for text in ("", right, NO_TIMES + right))
    for text in ("", NO_TIMES, other, NO_TIMES + right, right + right):
        assert not shows_times(text, ["x_selection"])


def test_ways_to_select():
    rows = load(SELECTION)["rows"]
    _, *body = table(WAYS, "right answers in %, tokens read by a query")
    _, *others = table(WAYS, "budgets in place of one number")
    assert len(body) == 15 and len(others) == 4
    cells = [(label, budget, c) for label, *own in body for budget, c in zip((128, 256), own)]
    for label, budget, cell in cells + [(label, 0, c) for label, c in others]:
        percent, tokens = right(rows, "recall-64", method_of(label), budget)
        assert cell == f"{percent:.1f} ({tokens:.0f})", (label, budget)


@pytest.mark.parametrize(
    ("document", "last"), [("docs/page_sketches.md", "sketch, 2 bits"), (WAYS, "")]
)
def test_attention_mass_of_synthetic_keys(document, last):
    found = {(row["keys"], row["pages"]): row for row in load(SKETCHES)["synthetic"]}
    (_, *summaries), *body = table(document, "keys")
    assert len(body) == len(found) / 2 and (not last or last in summaries)
    for keys, *cells in body:
        for summary, cell in zip(summaries, cells):
            assert cell == " ".join(f"{found[keys, n][summary]:.3f}" for n in (32, 128))


def test_attention_mass_of_a_sentence_encoder():
    found = load(SKETCHES)
    trained, sizes = found["trained"], found["bytes_per_page"]["32"]
    assert trained["pages"] == [2, 4, 8] and trained["windows"] == 12
    _, *body = table("docs/page_sketches.md", "| bytes of min/max")
    assert len(body) == 4
    for summary, size, *cells in body:
        if size:
            assert float(size) == round(sizes[summary] / sizes["minmax"], 2)
        for name, cell in zip((summary, f"{summary}, maximum"), cells):
            assert cell == " ".join(f"{x:.3f}" for x in trained.get(name, ()))


@pytest.mark.parametrize(
    ("header", "part", "budgets"),
    [("| bytes, head_dim 64", 0, (32, 64, 128, 256)), ("| budget 128 | 256", 1, (128, 256))],
)
def test_answers_with_sketches(header, part, budgets):
    found = load(SKETCHES)
    rows = {(row["method"], row["budget"]): row for row in found["recall"][part]["rows"]}
    columns, *body = table("docs/page_sketches.md", header)
    assert len(body) == 4 and [int(c.split()[-1]) for c in columns[-len(budgets) :]] == [*budgets]
    for label, *cells in body:
        method = SKETCH_ROWS.get(label, label)
        if len(cells) > len(budgets) and cells[0]:
            assert int(cells[0]) == found["bytes_per_page"]["64"][method]
        for budget, cell in zip(budgets, cells[-len(budgets) :]):
            row = rows[method, budget]
            right, low, high = (100 * row[name] for name in ("right", "low", "high"))
            mass = f"{row['mass_kept']:.2f}".lstrip("0")
            assert cell == f"{right:.1f} [{low:.1f}, {high:.1f}] ({mass})", (label, budget)


def test_answers_against_time():
    rows, results = load(LONG_ANSWERS)["rows"], load_results(RESULTS / BUDGETS)
    times = {
        (r.method, r.metadata["context"]): 1e3 * r.median
        for r in select(whole(results), dtype="bfloat16")
    }
    _, *body = table("docs/page_sketches.md", "| right | 32K tokens")
    assert len(body) == 9
    for label, answers, short, short_ratio, long, long_ratio in body:
        summary, _, budget = label.partition(", ")
        if summary == "dense":
            method, of = "dense_decode", ("dense", 0)
        else:
            method = f"quest{'-sketch' if summary == 'sketch' else ''}_{budget}"
            of = ("quest:summary=sketch" if summary == "sketch" else "quest", int(budget))
        assert answers == f"{right(rows, 'recall-128', *of)[0]:.1f} %"
        for context, cell, ratio in ((32768, short, short_ratio), (131072, long, long_ratio)):
            own = times[method, context]
            assert cell in (f"{own:.2f} ms", f"{own:.3g} ms")
            faster = times["dense_decode", context] / own
            assert ratio in (f"{faster:.1f}", f"{faster:.0f}")
