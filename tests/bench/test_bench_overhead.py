"""bench overhead: what it proves before it measures, and where its results go."""

import re

import pytest
import torch

from quest_compile.bench import bench_overhead, records
from quest_compile.bench.results import RefusedError, load_results


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One graph of four layers, few steps; a folder of results of its own."""
    torch._dynamo.reset()
    monkeypatch.setattr(bench_overhead, "LAYER_COUNTS", (4,))
    monkeypatch.setattr(bench_overhead, "ROUNDS", 2)
    state_seconds = bench_overhead.state_seconds
    monkeypatch.setattr(bench_overhead, "state_seconds", lambda n: state_seconds(n, steps=2))
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path


def test_record_names_its_folder_by_date_machine_and_commit(small):
    assert bench_overhead.main(["--record", "--max-load", "99"]) == 0
    (folder,) = small.iterdir()
    commit = records.commit().replace("+", "-")
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_.+_{re.escape(commit)}_overhead", folder.name)
    found = {r.workload.removeprefix("overhead/4 layers/"): r for r in load_results(folder)}
    assert set(found) == {"passes", "a step with nothing", "a step with state"}
    passes, state = found["passes"].metadata, found["a step with state"].metadata
    assert (passes["layers"], passes["replaced_layers"], passes["sparse_layers"]) == (4, 4, 2)
    assert state["layers_with_state"] == 4
    for facts in (passes, state):
        assert facts["threads"] == torch.get_num_threads() and facts["commit"] == records.commit()
        assert facts["other_load"] >= 0 and facts["torch"] == torch.__version__
    assert all(len(r.values) == 2 and min(r.values) > 0 for r in found.values())


def test_resume_measures_what_is_missing(small, monkeypatch):
    folder = str(small / "kept")

    def fails(num_layers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench_overhead, "state_seconds", fails)
        assert bench_overhead.main(["--output", folder, "--max-load", "99"]) == 130
    monkeypatch.setattr(bench_overhead, "passes_seconds", fails)
    assert bench_overhead.main(["--output", folder, "--resume", "--max-load", "99"]) == 0
    assert len(load_results(small / "kept")) == 3


def test_passes_that_leave_layers_dense_are_refused(monkeypatch):
    monkeypatch.setattr(
        bench_overhead, "decode_graph", lambda n: torch.fx.symbolic_trace(lambda x: x + 1)
    )
    with pytest.raises(RefusedError, match="0 of 4 layers are sparse"):
        bench_overhead.passes_seconds(4)


def test_steps_that_keep_no_state_are_refused(small, monkeypatch, capsys):
    monkeypatch.setattr(bench_overhead, "with_state", lambda compiled, *_, **__: compiled)
    assert bench_overhead.main(["--output", str(small / "x"), "--max-load", "99"]) == 1
    assert "0 of 4 layers have a state" in capsys.readouterr().err
    assert {r.workload for r in load_results(small / "x")} == {"overhead/4 layers/passes"}


def test_a_loaded_machine_marks_the_results(small, monkeypatch):
    monkeypatch.setattr(bench_overhead.LoadMeter, "other_load", lambda meter: 0.5)
    assert bench_overhead.main(["--output", str(small / "x")]) == 1
    marks = {r.marked for r in load_results(small / "x")}
    assert marks == {"other processes used 0.5 cores, more than 0.25"}
