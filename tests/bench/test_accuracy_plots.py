"""Plots of answers: which rows meet which times, and what is refused."""

import json

import pytest

from quest_compile.bench import bench_report
from quest_compile.bench.__main__ import main as bench_main
from quest_compile.bench.report.accuracy import kind_of, load_answers
from quest_compile.bench.results import Result, write_results

FACTS = {"benchmark": "ops", "cpu_count": 2, "cpu_model_name": "x", "kernels": "cpu:avx2"}
FACTS |= {"torch": "2", "commit": "abc", "date": "2026-11-22", "dtype": "bfloat16", "threads": 2}
FACTS |= {"context": 32768, "shape": "s", "bytes_moved": 1, "fraction_of_read_loop": 0.5}


def row(method, budget, value):
    compared = {"difference": value - 0.98, "low": value - 1, "high": value - 0.9}
    own = {"task": "recall-64", "length": 4096, "kind": "answer", "method": method}
    return own | {
        "budget": budget,
        "value": value,
        "comparison": compared if budget else None,
    }


@pytest.fixture
def folder(tmp_path):
    found = [Result("s", "dense_decode", [6e-3], FACTS)]
    for method, seconds in (("quest_2048", 1e-3), ("quest-paper_256", 5e-4)):
        found.append(Result("s", method, [seconds], FACTS | {"budget": 256}))
    write_results(tmp_path, found)
    return tmp_path


def test_answers_are_drawn_against_budgets_and_against_the_times_of_the_same_settings(folder):
    pytest.importorskip("matplotlib")
    rows = [row("dense", 0, 0.98), row("quest", 2048, 0.97), row("quest:preset=paper", 256, 0.96)]
    rows.append(row("oracle", 256, 0.98))
    answers = folder / "eval" / "results.json"
    answers.parent.mkdir()
    answers.write_text(json.dumps({"rows": rows}))
    assert bench_report.main([str(folder), "--accuracy", str(answers)]) == 0
    report = (folder / "report.md").read_text()
    for name in ("accuracy_recall-64_4096", "accuracy_time_recall-64_4096_bfloat16"):
        assert f"]({name}.svg)" in report
    drawn = (folder / "accuracy_time_recall-64_4096_bfloat16.svg").read_text()
    for text in ("quest, 32K tokens", "quest-paper, 32K tokens", "dense, 32K tokens"):
        assert text in drawn
    assert "oracle" not in drawn


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("quest", "quest"),
        ("quest:num_sink_pages=0,num_recent_pages=1,summary=sketch", "quest-sketch"),
        ("quest:summary=minmax,group_reduce=sum", "quest-minmax"),
        ("quest:sketch_bits=1", "quest-sketch1"),
        ("quest:group_reduce=none", None),
        ("oracle", None),
    ],
)
def test_only_rows_of_what_was_timed_have_a_time(method, kind):
    assert kind_of(row(method, 128, 0.5)) == kind


def test_other_files_are_refused(folder, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="not a results.json of quest-compile eval"):
        load_answers(path)
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no rows of right answers"):
        load_answers(path)
    with pytest.raises(SystemExit):
        bench_report.main([str(folder), "--accuracy", str(tmp_path / "nothing.json")])
    assert "--accuracy takes a results.json of quest-compile eval" in capsys.readouterr().err


def test_the_folder_of_an_evaluation_will_do_for_answers(folder):
    pytest.importorskip("matplotlib")
    out = folder / "quest-eval"
    out.mkdir()
    rows = [row("dense", 0, 0.98), row("quest", 2048, 0.97)]
    (out / "results.json").write_text(json.dumps({"rows": rows}))
    assert bench_report.main([str(folder), "--accuracy", str(out)]) == 0
    report = (folder / "report.md").read_text()
    assert "are those of `quest-eval/results.json`" in report
    assert "](accuracy_recall-64_4096.svg)" in report


def test_the_folder_of_an_evaluation_is_no_folder_of_bench_results(folder, capsys):
    out = folder / "quest-eval"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"rows": []}))
    assert bench_main(["report", str(out)]) == 2
    says = capsys.readouterr().err
    assert "expected a folder of bench results" in says
    assert f"got {out}, which quest-compile eval wrote: its report is results.md" in says
    assert bench_main(["report", str(out / "results.json")]) == 2
    assert "which is no folder" in capsys.readouterr().err
