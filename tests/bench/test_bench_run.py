"""torchbench's entry: where it writes, and what it refuses; the list of benchmarks."""

import json
import re
from pathlib import Path

import pytest

from quest_compile.bench import run as subject
from quest_compile.bench.__main__ import BENCHMARKS
from quest_compile.bench.__main__ import main as bench_main
from quest_compile.bench.results import Recorder, Result
from quest_compile.bench.run import DRIVEN, run


@pytest.fixture
def measured(monkeypatch):
    """``main`` as a benchmark that keeps one result; the arguments it was given."""
    seen = []

    def main(args):
        seen.append(args)
        folder = Path(args[args.index("--output") + 1])
        Recorder(args[0], folder).add([Result("tiny", "quest_64", [1.0, 3.0, 2.0], {})])
        return 0

    monkeypatch.setattr(subject, "main", main)
    return seen


@pytest.mark.parametrize("form", ["--output {}", "--output={}", "--out {}", "--record"])
def test_every_way_to_name_the_folder(form, measured, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    monkeypatch.setattr(subject, "record_folder", lambda name: folder)
    path = run(["ops", "--quick", *form.format(folder).split(), "--rounds", "3"])
    assert measured == [["ops", "--quick", "--rounds", "3", "--output", str(folder)]]
    assert path.parent == folder and path.name.startswith("metrics-")
    found = json.loads(path.read_text())
    assert found["name"] == "quest_compile-ops"
    assert found["metrics"] == {"tiny, quest_64": 2.0}


def test_without_a_folder_it_is_that_of_torchbench(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run(["decode"])
    assert path.parts[:2] == (".userbenchmark", "quest_compile-decode")


@pytest.mark.parametrize("args", [[], ["--quick"], ["nosuch"], ["gpu-check"], ["report"]])
def test_what_cannot_be_driven_is_refused_with_what_can(args):
    with pytest.raises(ValueError, match=f"args must begin with one of {', '.join(DRIVEN)}, got"):
        run(args)


def test_overhead_can_be_driven(tmp_path, monkeypatch):
    from quest_compile.bench import bench_overhead

    monkeypatch.setattr(bench_overhead, "LAYER_COUNTS", (4,))
    monkeypatch.setattr(bench_overhead, "passes_seconds", lambda n: ([0.5], {}))
    monkeypatch.setattr(bench_overhead, "state_seconds", lambda n: ({"state": [0.25]}, {}))
    metrics = json.loads(run(["overhead", f"--output={tmp_path}"]).read_text())["metrics"]
    assert metrics == {
        "overhead/4 layers/passes, quest": 0.5,
        "overhead/4 layers/a step with state, quest": 0.25,
    }


def test_an_error_is_not_taken_for_the_results_of_an_earlier_run(tmp_path):
    Recorder("overhead", tmp_path).add([Result("tiny", "quest_64", [1.0], {})])
    with pytest.raises(ValueError, match="bench overhead ended with an error"):
        run(["overhead", "--output", str(tmp_path)])


def test_the_list_and_the_readme_say_the_same(capsys):
    assert bench_main(["--list"]) == 0
    listed = capsys.readouterr().out
    text = (Path(__file__).resolve().parents[2] / "bench" / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.+?) \|", text, re.MULTILINE))
    assert list(rows) == list(BENCHMARKS)
    for name, what in BENCHMARKS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", listed, re.MULTILINE)
        assert rows[name].startswith(what)
    assert tuple(BENCHMARKS)[: len(DRIVEN)] == DRIVEN
