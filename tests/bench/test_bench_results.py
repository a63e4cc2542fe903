"""Files of results: what pyperf makes of them, resuming, torchbench's metrics."""

import json
import subprocess
import sys

import pytest

from quest_compile.bench import bench_decode
from quest_compile.bench import results as subject
from quest_compile.bench.results import Recorder, Result, load_results, write_results

IDENTITY = {"commit": "abc", "cpu_model_name": "x", "torch": "2", "transformers": "5"}
IDENTITY |= {"kernels": "cpu:avx2", "cpu_count": 2, "date": "2026-11-22 12:00:00"}


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    monkeypatch.setattr(subject, "identity", lambda: dict(IDENTITY))


def result(method="quest_64", workload="tiny/context64", **metadata):
    return Result(workload, method, [1.0, 2.0, 4.0], {"context": 64} | metadata)


def test_results_come_back_as_they_were_written(tmp_path):
    written = [result(), result("dense_decode"), result(workload="tiny/context128", marked="load")]
    write_results(tmp_path, written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense_decode.json", "quest_64.json"]
    read = {(r.workload, r.method): r for r in load_results(tmp_path)}
    assert len(read) == 3
    for wrote in written:
        found = read[wrote.workload, wrote.method]
        assert list(found.values) == wrote.values
        assert found.metadata == wrote.metadata
        assert found.marked == wrote.marked


def test_pyperf_compares_two_methods(tmp_path):
    slow = [Result(f"tiny/context{n}", "dense", [4.0, 4.1], {}) for n in (64, 128)]
    fast = [Result(f"tiny/context{n}", "quest", [1.0, 1.1], {}) for n in (64, 128)]
    write_results(tmp_path, slow + fast)
    files = [str(tmp_path / name) for name in ("dense.json", "quest.json")]
    command = [sys.executable, "-m", "pyperf", "compare_to", *files, "--table"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "tiny/context64" in out and "tiny/context128" in out
    assert "3.86x faster" in out


def test_a_folder_with_results_is_not_written_to_without_resume(tmp_path):
    Recorder("ops", tmp_path).add([result()])
    with pytest.raises(ValueError, match="holds results already: add --resume"):
        Recorder("ops", tmp_path)
    resumed = Recorder("ops", tmp_path, resume=True)
    assert resumed.has("tiny/context64", ["quest_64"])
    assert not resumed.has("tiny/context64", ["quest_64", "dense_decode"])
    assert not resumed.has("tiny/context128")


def test_resume_measures_again_what_was_interrupted(tmp_path):
    Recorder("ops", tmp_path).add([result(interrupted="fewer rounds")])
    assert not Recorder("ops", tmp_path, resume=True).has("tiny/context64")


def test_resume_measures_again_what_was_marked_or_refused_and_keeps_the_rest(tmp_path):
    recorder = Recorder("overhead", tmp_path)
    recorder.add([Result(name, "quest", [1.0], {}) for name in ("good", "loaded")])
    recorder.add([Result("loaded", "quest", [9.0], {"marked": "other processes"})])
    recorder.add([Result("loaded", "dense", [9.0], {"marked": "other processes"})])
    recorder.refuse("wrong", subject.RefusedError("not sparse"))
    resumed = Recorder("overhead", tmp_path, resume=True)
    assert resumed.has("good")
    assert not resumed.has("loaded") and not resumed.has("wrong")
    assert len(load_results(tmp_path)) == 3
    resumed.add([Result("loaded", "quest", [2.0], {}), Result("wrong", "quest", [3.0], {})])
    found = {(r.workload, r.method): (*r.values, r.marked) for r in load_results(tmp_path)}
    # Nobody measured the dense method again: its marked value is gone.
    assert found == {
        ("good", "quest"): (1.0, ""),
        ("loaded", "quest"): (2.0, ""),
        ("wrong", "quest"): (3.0, ""),
    }
    assert resumed.status() == 0


def test_resume_refuses_results_of_another_commit(tmp_path, monkeypatch):
    Recorder("ops", tmp_path).add([result()])
    monkeypatch.setattr(subject, "identity", lambda: IDENTITY | {"commit": "def"})
    with pytest.raises(ValueError, match="was measured with commit 'abc', this is 'def'"):
        Recorder("ops", tmp_path, resume=True)


def test_marked_and_refused_results_fail_the_run(tmp_path, capsys):
    recorder = Recorder("ops", tmp_path)
    recorder.add([result()])
    assert recorder.status() == 0
    recorder.add([result(marked="other processes used 2 cores")])
    assert recorder.status() == 1
    assert (
        "MARKED tiny/context64, quest_64: other processes used 2 cores" in capsys.readouterr().out
    )
    recorder.add([result()])
    recorder.refuse("tiny/context128", subject.RefusedError("not sparse"))
    assert recorder.status() == 1
    assert "REFUSED tiny/context128: not sparse" in capsys.readouterr().err


def test_a_file_that_is_not_of_pyperf_is_named(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="x.json is not a pyperf result"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--settings", "nosuch"], "--settings must be of quest, quest-paper, "),
        (["--model-shape", "tiny", "--layers", "99"], "--layers must be from 1 to"),
        (["--batch", "x"], "expected positive numbers, got 'x'"),
    ],
)
def test_options_are_checked_before_a_model_is_made(arguments, says, capsys):
    with pytest.raises(SystemExit):
        bench_decode.main([*arguments, "--list"])
    assert says in capsys.readouterr().err
