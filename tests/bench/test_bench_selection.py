"""bench selection: ways are what their names say, and what is kept, marked, refused and shown."""

import json
import re
import time

import pytest
import torch

from quest_compile import ops
from quest_compile.bench import bench_selection, identity, selection_ways
from quest_compile.bench.__main__ import main as bench_main
from quest_compile.bench.load import LoadMeter
from quest_compile.bench.report.document import with_tables
from quest_compile.bench.report.more_tables import selection
from quest_compile.bench.results import RefusedError, Result, load_results
from quest_compile.bench.run import run
from quest_compile.bench.selection_ways import WAYS, method_of, prove, way

pytestmark = pytest.mark.skipif(
    not ops.native_status().loaded, reason="bench refuses to time plain torch"
)
QUIET = ["--max-load", "99", "--rounds", "3"]


@pytest.fixture
def tensors():
    """Queries, and two copies of 1024 tokens with two KV heads."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 1024, 16, generator=generator).bfloat16()
    queries = [torch.randn(1, 4, 1, 16, generator=generator).bfloat16() for _ in range(8)]
    return queries, [(keys.clone(), keys.clone()) for _ in range(2)]


@pytest.fixture
def small(tensors, monkeypatch, tmp_path):
    """The command with these tensors; a folder of results of its own."""
    monkeypatch.setattr(bench_selection, "inputs", lambda: tensors)
    monkeypatch.setattr(identity, "RESULTS", tmp_path)
    return tmp_path


def budgets_of(folder):
    return {r.metadata["budget"] for r in load_results(folder)}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_proven(tensors, name):
    facts = prove(name, way(WAYS[name], 128, *tensors), 2)
    assert 64 < facts["tokens_read"] <= 128
    # Two heads, keys and values of 16 bfloat16 each, and summaries of 63 pages, at most 72 bytes.
    attended = facts["tokens_read"] * 2 * 2 * 16 * 2
    if "none" not in name:
        assert attended < facts["bytes_moved"] <= attended + 63 * 2 * 72


def test_a_way_that_is_not_sparse_is_refused(tensors):
    with pytest.raises(RefusedError, match="^default: expected sparse_calls 16, got 0"):
        prove("default", way({"budget": 2048}, 128, *tensors), 2)


def test_what_is_refused_is_not_timed(small, monkeypatch, capsys):
    monkeypatch.setitem(WAYS, "top_p=0.9", {"budget": 2048})
    assert bench_selection.main(["--output", str(small / "x"), *QUIET, "--budgets", "128"]) == 1
    assert "budget128: top_p=0.9: expected sparse_calls 16, got 0" in capsys.readouterr().err
    assert load_results(small / "x") == []


def test_plain_torch_is_refused(small, monkeypatch, capsys):
    def refuses(device):
        raise RefusedError("plain torch serves")

    monkeypatch.setattr(bench_selection, "check_kernels", refuses)
    assert bench_selection.main(["--output", str(small / "x"), *QUIET, "--budgets", "128"]) == 1
    assert "plain torch serves" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(small, monkeypatch, capsys):
    command = ["--output", str(small / "x"), *QUIET, "--budgets", "64,96,128"]
    measured = []

    def counted(settings, budget, *tensors):
        measured.append(budget)
        sample = way(settings, budget, *tensors)

        def stops(number):
            if (settings, budget, number) == (WAYS["default"], 96, 20):
                raise KeyboardInterrupt
            return sample(number)

        return stops

    with monkeypatch.context() as patch:
        patch.setattr(bench_selection, "way", counted)
        assert bench_selection.main([*command, "--rounds", "30"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert set(measured) == {64, 96}
    assert budgets_of(small / "x") == {64, 96}
    assert {r.metadata["budget"] for r in load_results(small / "x") if len(r.values) < 30} == {96}
    measured.clear()
    monkeypatch.setattr(bench_selection, "way", lambda *a: measured.append(a[1]) or way(*a))
    assert bench_selection.main([*command, "--resume"]) == 0
    assert set(measured) == {96, 128}
    assert budgets_of(small / "x") == {64, 96, 128}


def test_a_loaded_machine_marks_the_results_of_its_budget(small, monkeypatch):
    loads = iter([0.0] + [0.5] * 100)
    monkeypatch.setattr(LoadMeter, "other_load", lambda meter: next(loads, 0.0))
    monkeypatch.setattr(LoadMeter, "elapsed", lambda meter: 1.0)
    monkeypatch.setattr(bench_selection, "prove", proves_and_calms(loads))
    command = ["--output", str(small / "x"), "--rounds", "3", "--budgets", "64,128"]
    assert bench_selection.main(command) == 1
    marks = {(r.metadata["budget"], r.marked) for r in load_results(small / "x")}
    assert marks == {(64, "other processes used 0.5 cores, more than 0.25"), (128, "")}


def proves_and_calms(loads):
    """``prove`` that ends the load with the second budget."""
    proven = []

    def proves(name, sample, num_copies):
        proven.append(name)
        if proven.count("default") == 2:
            list(loads)
        return prove(name, sample, num_copies)

    return proves


def test_results_are_not_written_over(small, capsys):
    command = ["selection", "--output", str(small / "x"), *QUIET, "--budgets", "128"]
    assert bench_main(command) == 0
    kept = {path: path.read_bytes() for path in (small / "x").iterdir()}
    assert bench_main(command) == 2
    assert "holds results already: add --resume" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in (small / "x").iterdir()}


def test_record_names_its_folder_and_every_way_has_a_result(small):
    assert bench_selection.main(["--record", *QUIET, "--budgets", "64,128"]) == 0
    (folder,) = small.iterdir()
    commit = re.escape(identity.commit().replace("+", "-"))
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_.+_{commit}_selection", folder.name)
    results = load_results(folder)
    assert len(results) == 2 * (len(WAYS) + 1)
    read = {r.metadata["budget"]: r for r in results if r.method == "read_loop"}
    for r in results:
        facts, loop = r.metadata, read[r.metadata["budget"]]
        assert (facts["context"], facts["commit"]) == (1024, identity.commit())
        assert facts["bytes_per_second"] == pytest.approx(facts["bytes_moved"] / r.median)
        share = facts["bytes_per_second"] / (2 * 2 * 1024 * 16 * 2 / loop.median)
        assert facts["fraction_of_read_loop"] == pytest.approx(share)


def test_a_value_is_the_mean_of_its_steps(tensors, monkeypatch):
    ticks = iter(range(0, 1000, 32))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert way({}, 128, *tensors)(0) == 32 / (8 * 2)


def test_quick_is_five_rounds_of_one_budget(small, tensors, monkeypatch):
    for name in list(WAYS)[2:]:
        monkeypatch.delitem(WAYS, name)
    longer = [tuple(x.repeat(1, 1, 4, 1) for x in cache) for cache in tensors[1]]
    monkeypatch.setattr(bench_selection, "inputs", lambda: (tensors[0], longer))
    command = ["--max-load", "99", "--quick", "--output"]
    assert bench_selection.main([*command, str(small / "x")]) == 0
    assert budgets_of(small / "x") == {2048}
    assert {len(r.values) for r in load_results(small / "x")} == {5}
    assert bench_selection.main([*command, str(small / "y"), "--rounds", "4"]) == 0
    assert {len(r.values) for r in load_results(small / "y")} == {4}


def test_torchbench_can_drive_it(small):
    path = run(["selection", *QUIET, "--budgets", "128", "--output", str(small / "x")])
    metrics = json.loads(path.read_text("utf-8"))["metrics"]
    assert len(metrics) == len(WAYS) + 1
    assert all(name.partition("budget128, ")[2] for name in metrics)


def test_the_names_of_the_files():
    assert method_of('top_p=0.9, summary="sketch"') == "top_p=0.9,summary=sketch"
    assert len({method_of(name) for name in WAYS}) == len(WAYS)


def row(name, budget, value, **facts):
    metadata = {"budget": budget, "way": name, "tokens_read": budget - 0.6}
    metadata |= {"bytes_moved": budget * 2**10, "fraction_of_read_loop": 0.512}
    return Result(f"s/budget{budget}", method_of(name), [value], metadata | facts)


def test_the_table_is_that_of_the_results():
    results = [
        row('top_p=0.9, summary="sketch"', 2048, 1.5e-3),
        row("default", 2048, 1e-3),
        row("default", 1024, 5e-4, marked="load"),
        Result("s/budget1024", "read_loop", [1.0], {"budget": 1024}),
    ]
    header, _, default, sketch = selection(results).splitlines()
    assert header.count("budget 1024 | to default | tokens read | MiB read | of read |") == 1
    assert default == (
        "| default | 500 us (!) | 1.00 | 1023 | 1.0 | 0.51 | 1 ms | 1.00 | 2047 | 2.0 | 0.51 |"
    )
    assert sketch == (
        '| `top_p=0.9, summary="sketch"` | - | - | - | - | - | 1.5 ms | 1.50 | 2047 | 2.0 | 0.51 |'
    )


def test_documents_get_the_table_from_a_record(small):
    assert bench_selection.main(["--output", str(small / "r"), *QUIET, "--budgets", "128"]) == 0
    text = with_tables("<!-- bench: selection r -->\n<!-- bench end -->\n", small)
    assert text.count("\n| `") == len(WAYS) - 1 and "commit" in text


def test_the_real_tensors_are_cold_and_differ(monkeypatch):
    pair = torch.randn(1, 32, 1, 128), torch.randn(1, 8, 64, 128)
    monkeypatch.setattr(selection_ways, "synthetic_heads", lambda *_, **__: iter([pair] * 4))
    queries, caches = selection_ways.inputs()
    assert len(queries) == 8
    assert len({x.data_ptr() for cache in caches for x in cache}) == 2 * len(caches) == 8
    assert not torch.equal(*caches[0])
