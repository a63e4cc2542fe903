"""``bench ops`` on a tiny shape: what it measures, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch

from quest_compile import ops
from quest_compile.bench import bench_ops
from quest_compile.bench.ops import checks, methods, overhead, prove
from quest_compile.bench.ops.inputs import Workload, make_steps
from quest_compile.bench.results import RefusedError, Result, load_results
from quest_compile.bench.run import run
from quest_compile.bench.settings import MORE, QUEST, Setting
from quest_compile.bench.shapes import Layer

TINY = ["--model-shape", "tiny", "--contexts", "256", "--budgets", "64", "--dtype", "float32"]
FAST = ["--rounds", "2", "--max-load", "99", "--no-llama-cpp"]
SETTINGS = [Setting(kind, 64) for kind in QUEST | MORE]

pytestmark = pytest.mark.skipif(
    not ops.native_status().loaded, reason="bench refuses to time plain torch"
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr("quest_compile.bench.ops.inputs.ROTATED_BYTES", 1)
    workload = Workload("tiny", Layer(4, 2, 16), 250, torch.float32)
    return workload, make_steps(workload, SETTINGS)


def test_a_run_measures_every_method_under_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr("quest_compile.bench.ops.inputs.ROTATED_BYTES", 1)
    monkeypatch.setattr(methods, "inner_compiler", lambda *_: "eager")
    path = run(["ops", *TINY, *FAST, "--output", str(tmp_path)])
    results = load_results(tmp_path)
    whole = [r for r in results if r.workload.endswith(f"threads{torch.get_num_threads()}")]
    assert {r.method for r in whole} == {
        "read_loop",
        "dense_decode",
        "quest_64",
        "quest-paper_64",
        "quest-minmax_64",
        "quest-sketch1_64",
        "sdpa_group_as_q_len",
        "sdpa_enable_gqa",
        "sdpa_transformers",
    }
    assert len({r.workload for r in whole}) == 1
    stages = {r.workload.rpartition("/")[2] for r in results if r.method == "quest_64"}
    assert stages >= {"update", "score", "select", "attend"}
    (quest,) = [r for r in whole if r.method == "quest_64"]
    assert quest.metadata["sparse_calls"] == 1
    assert quest.metadata["tokens_per_query"] == 64
    assert quest.metadata["error"] <= 1e-5
    assert quest.metadata["kernels"] == ops.native_status().info
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics[f"{quest.workload}, quest_64"] == quest.median


def test_resume_measures_the_cost_of_a_call_again_only_where_it_is_missing(tmp_path, monkeypatch):
    calls, facts = [], {"rounds_dropped": 0}

    def measured(rounds):
        calls.append(rounds)
        return [Result(name, overhead.METHOD, [1e-5], facts) for name in overhead.WORKLOADS]

    monkeypatch.setattr(overhead, "measure_overhead", measured)
    monkeypatch.setattr(bench_ops, "workloads_of", lambda args: [])
    command = ["--output", str(tmp_path), "--no-llama-cpp"]
    assert bench_ops.main(command) == 0
    assert bench_ops.main([*command, "--resume"]) == 0
    assert len(calls) == 1
    (tmp_path / "overhead.json").unlink()
    assert bench_ops.main([*command, "--resume"]) == 0
    assert len(calls) == 2


def test_a_context_within_the_budget_is_dense_and_has_no_stages(steps, monkeypatch):
    workload, made = steps
    found = methods.methods_of(workload, made, [Setting(budget=256)], ["quest_256"])
    assert [m.key for m in found] == ["read_loop", "quest_256"]
    assert prove.check_method(found[1], made[0])["sparse_calls"] == 0


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_and_its_stages_are_right(steps, setting):
    workload, made = steps
    found = methods.quest_methods(setting, made, workload)
    assert [m.stage for m in found] == ["", "update", "score", "select", "attend"]
    whole, *stages = found
    facts = prove.check_method(whole, made[0])
    assert 48 < facts["tokens_per_query"] <= 64 and facts["error"] <= 1e-5
    assert whole.bytes_moved == stages[1].bytes_moved + stages[3].bytes_moved
    for method in stages:
        prove.check_method(method, made[0])


def test_an_update_that_does_nothing_is_refused(steps):
    workload, made = steps
    _, update, *_ = methods.quest_methods(SETTINGS[0], made, workload)
    update.call = lambda step: None
    with pytest.raises(RefusedError, match="quest_64/update: makes another row"):
        prove.check_method(update, made[0])


def methods_by_key(steps):
    workload, made = steps
    wanted = ["quest_64", "dense_decode", "sdpa_enable_gqa"]
    found = methods.methods_of(workload, made, SETTINGS, wanted)
    return {m.key: m for m in found}, made[0]


def test_a_wrong_result_is_refused(steps):
    found, step = methods_by_key(steps)
    method = found["quest_64"]
    right = method.call
    method.call = lambda s: right(s) + 1e-3
    with pytest.raises(RefusedError, match="quest_64: wrong, error"):
        prove.check_method(method, step)


def test_forms_of_torch_may_round_as_they_like_but_not_be_wrong(steps):
    found, step = methods_by_key(steps)
    ours, torchs = found["dense_decode"], found["sdpa_enable_gqa"]
    error = prove.check_method(torchs, step)["error_of_torch"]
    right, dense = torchs.call, ours.call
    torchs.call = lambda s: right(s) + 10 * error
    prove.check_method(torchs, step)
    ours.call = lambda s: dense(s) + 10 * error
    with pytest.raises(RefusedError, match="dense_decode: wrong, error"):
        prove.check_method(ours, step)
    torchs.call = lambda s: right(s) + 1e-3
    with pytest.raises(RefusedError, match="sdpa_enable_gqa: wrong, error"):
        prove.check_method(torchs, step)


def test_a_dense_call_under_the_name_of_quest_is_refused(steps):
    found, step = methods_by_key(steps)
    found["quest_64"].call = methods.dense_decode
    with pytest.raises(RefusedError, match="quest_64: expected sparse_calls, counted"):
        prove.check_method(found["quest_64"], step)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_other_scores_and_pages_than_those_of_the_reference_are_refused(steps, setting):
    workload, made = steps
    others = {
        "score_pages": lambda *a, **s: methods.SERVED.score_pages(*a, **s).roll(1, -1),
        "select_pages": lambda *a, **s: methods.SERVED.select_pages(*a, **s).flip(-1),
    }
    for name, wrong in others.items():
        served = SimpleNamespace(**vars(methods.SERVED) | {name: wrong})
        why = "scores differ" if name == "score_pages" else "selects other pages"
        with pytest.raises(RefusedError, match=f"{setting.name}: {why}"):
            methods.quest_methods(setting, made, workload, served)


def test_kernels_of_another_level_are_refused(monkeypatch):
    monkeypatch.setenv("QUEST_COMPILE_ISA", "another")
    with pytest.raises(RefusedError, match="QUEST_COMPILE_ISA=another, but cpu:"):
        checks.check_kernels("cpu")


def test_plain_torch_is_refused(monkeypatch):
    status = ops.native_status().__class__(False, "torch reference", "disabled")
    monkeypatch.setattr(checks.ops, "native_status", lambda: status)
    with pytest.raises(RefusedError, match="plain torch serves, not our kernels: disabled"):
        checks.check_kernels("cpu")


def test_list_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bench_ops, "measure", None)
    assert bench_ops.main(["--list", *TINY, "--contexts", "4K", "--threads", "1,2"]) == 0
    out = capsys.readouterr().out
    assert "tiny/float32/batch1/context4096/threads2" in out
    assert "quest-sketch1_64" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype must be of float32"),
        (["--contexts", "4Q"], "expected tokens such as 32768 or 32K, got '4Q'"),
        (["--batch", "0"], "expected positive numbers, got '0'"),
        (["--methods", "quest_1"], "--methods must be of read_loop, dense_decode, quest_2048"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_mistakes_name_the_option(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_ops.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.nightly
def test_levels_run_in_processes_of_their_own(tmp_path):
    levels = "scalar,avx2"
    assert bench_ops.main([*TINY, *FAST, "--isa", levels, "--output", str(tmp_path)]) == 0
    kernels = {r.method: r.metadata["kernels"] for r in load_results(tmp_path)}
    assert "cpu:scalar" in kernels["quest_64@scalar"]
    assert "cpu:avx2" in kernels["quest_64@avx2"]
