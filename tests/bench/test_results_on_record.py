"""What bench/results/ and the documents show of results is what their JSON gives."""

import json
import re
import shutil
from pathlib import Path

import pytest

from quest_compile.bench import bench_report
from quest_compile.bench.gpu_check import record
from quest_compile.bench.report.document import with_tables
from quest_compile.eval.markdown import markdown
from quest_compile.eval.results import Row
from quest_compile.eval.statistics import Comparison

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
GPU_CHECKS = sorted(path.parent for path in RESULTS.glob("*/gpu-check.json"))
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir() and path not in GPU_CHECKS)
EVALS = sorted(RESULTS.glob("*_eval-*.json"))
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"]


@pytest.fixture
def only_svg(monkeypatch):
    """PNG files take most of the time, and show the same."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    savefig = figure.savefig

    def save(self, path, **options):
        if path.suffix == ".svg":
            savefig(self, path, **options)

    monkeypatch.setattr(figure, "savefig", save)


def accuracy_of(report):
    """The file that a report names for its answers, as arguments of bench report."""
    named = re.search(r"are those of `(\S+)`", report)
    return ["--accuracy", str(ROOT / "bench" / named[1])] if named else []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_reports_and_plots_are_those_of_the_results(folder, only_svg, tmp_path, capsys):
    again = tmp_path / folder.name
    again.mkdir()
    for path in folder.glob("*.json"):
        shutil.copy(path, again)
    report = (folder / "report.md").read_text("utf-8")
    assert bench_report.main([str(again), *accuracy_of(report)]) == 0
    assert (again / "report.md").read_text("utf-8") == report
    plots = {path.name for path in folder.glob("*.svg")}
    assert plots == {path.name for path in again.glob("*.svg")}
    for name in plots:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    assert {path.stem for path in folder.glob("*.png")} == {Path(name).stem for name in plots}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


@pytest.mark.parametrize("folder", GPU_CHECKS, ids=lambda path: path.name)
def test_pages_of_gpu_checks_are_those_of_their_json(folder):
    found = json.loads((folder / "gpu-check.json").read_text("utf-8"))
    assert (folder / "gpu-check.md").read_text("utf-8") == record.markdown(found)
    assert found["identity"]["commit"] in folder.name


@pytest.mark.parametrize("path", EVALS, ids=lambda path: path.stem)
def test_pages_of_eval_are_those_of_the_results(path):
    found = json.loads(path.read_text("utf-8"))
    rows = []
    for row in found["rows"]:
        for name in ("comparison", "loss_comparison"):
            row[name] = row.get(name) and Comparison(**row[name])
        # Results of one run need not say under which conditions.
        rows.append(Row(**{"conditions": (0,)} | row))
    page = path.with_suffix(".md").read_text("utf-8")
    conditions = found.get("conditions", ())
    assert markdown(rows, found["identity"], found["settings"], conditions) == page


def test_every_page_of_results_is_compared():
    """But for those of a benchmark that is gone."""
    gone = set(RESULTS.glob("*_sketch-accuracy.md"))
    assert {path.with_suffix(".md") for path in EVALS} == set(RESULTS.glob("*.md")) - gone


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_marked_tables_are_those_of_the_results(path):
    text = path.read_text("utf-8")
    assert with_tables(text) == text
