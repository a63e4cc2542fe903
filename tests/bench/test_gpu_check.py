"""The one command for a GPU machine, run on a CPU: all steps on tiny shapes, to see them work."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import fake_flashinfer
import pytest
import torch

from quest_compile import ops
from quest_compile.bench import bench_gpu_check
from quest_compile.bench.gpu_check import attention, checks, end_to_end, flashinfer_peer
from quest_compile.bench.gpu_check.attention import own_parts, run_attention
from quest_compile.bench.gpu_check.end_to_end import Decoding, run_end_to_end
from quest_compile.bench.gpu_check.kernels import figures_in
from quest_compile.bench.gpu_check.peers import peers_of
from quest_compile.bench.gpu_check.record import Record, Step, StepFailedError
from quest_compile.bench.gpu_check.steps import settings_of, steps_of
from quest_compile.bench.ops import inputs
from quest_compile.bench.ops.inputs import Workload, make_steps
from quest_compile.bench.ops.methods import SERVED, quest_methods
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import SHAPES, Layer

ROOT = Path(__file__).parents[2]
GPU_FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/gpu/test_gpu_*.py"))
SETTINGS = settings_of(64, 0.5)
TINY = [Workload.of_shape("tiny", 256, batch, "cpu", torch.float32) for batch in (1, 2)]


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch):
    monkeypatch.setattr(inputs, "ROTATED_BYTES", 1)


def run(folder, *arguments):
    code = bench_gpu_check.main(["--device", "cpu", "--output", str(folder), *arguments])
    return code, json.loads((folder / "gpu-check.json").read_text("utf-8"))


def test_measuring_steps_run_on_tiny_shapes(tmp_path):
    code, found = run(
        tmp_path,
        "--only",
        "environment,results,attention,kernels,sanitizer,profile,flashinfer",
    )
    assert code == 0
    steps = {step["name"]: step for step in found["steps"]}
    assert {name: step["status"] for name, step in steps.items()} == {
        "environment": "ok",
        "results": "ok",
        "attention": "ok",
        "kernels": "ok",
        "sanitizer": "skipped",
        "profile": "skipped",
        "flashinfer": "skipped",
    }
    assert all(row["ok"] for row in steps["results"]["rows"])
    calls = {row["method"]: row for row in steps["kernels"]["rows"]}
    assert calls.keys() == {"quest_64", "dense_decode"}
    assert all(row["us"] > 0 and row["host_us"] > 0 for row in calls.values())
    timed = [row for row in steps["attention"]["rows"] if "us" in row]
    methods = {row["method"] for row in timed}
    for setting in SETTINGS:
        stages = [f"/{stage}" for stage in ("update", "score", "select", "attend")]
        assert {f"{setting.name}{stage}" for stage in ("", *stages)} <= methods
    assert "dense_decode" in methods
    assert not [row for row in steps["attention"]["rows"] if "refused" in row]
    markdown = (tmp_path / "gpu-check.md").read_text("utf-8")
    assert "| quest_64 |" in markdown and found["identity"]["commit"] in markdown


DETAILS = """\
[2093] python3.12@127.0.0.1
  void score_kernel<PageScorer<BFloat16, BFloat16>, 0>(ScoreCall) (8, 16, 1)x(256, 1, 1), Context 1
    Section: GPU Speed Of Light Throughput
    DRAM Throughput                   %         4.42
    Duration                         us        41.12
    Executed Instructions                           inst    6,727,064
    Registers Per Thread             register/thread             254
  void attend_kernel<BFloat16>(AttendCall) (64, 2, 1)x(256, 1, 1), Context 1, Stream 7, Device 0
    Duration                         ms         1.5
"""


def test_figures_of_nsight_compute_are_read_from_its_text():
    assert figures_in(DETAILS) == [
        {"kernel": "score_kernel", "us": 41.12, "dram_percent": 4.42, "instructions": 6727064,
         "registers": 254},
        {"kernel": "attend_kernel", "us": 1500},
    ]  # fmt: skip


def test_a_model_decodes_sparse_and_dense(tmp_path):
    code, found = run(tmp_path, "--only", "end-to-end")
    (step,) = found["steps"]
    assert (code, step["status"]) == (0, "ok"), step["why"]
    rows = {row["method"]: row for row in step["rows"] if "method" in row}
    assert rows["quest"]["sparse_calls"] == 1 * 3
    assert [rows[name]["sparse_calls"] for name in rows if name.startswith("dense")] == [0] * 3
    assert step["rows"][-1]["best_dense"] in rows
    assert list(rows) == [
        "quest", "dense, quest::dense_decode", "dense, enable_gqa", "dense, repeat_kv"
    ]  # fmt: skip


def test_a_method_is_tried_while_there_is_time_for_the_slowest_so_far(tmp_path, monkeypatch):
    left = iter([30.0, 11.0, 9.0, 11.0, 11.0])
    monkeypatch.setattr(Record, "seconds_left", lambda self: next(left, 11.0))
    record = Record(tmp_path, 600.0, {})
    record.steps.append({"name": "x", "title": "X", "status": "ok", "why": "", "rows": []})
    monkeypatch.setattr(end_to_end, "_time", lambda *x: {"seconds": 1.0, "sparse_calls": 1})
    run_end_to_end(record, "cpu", [Decoding("tiny", 256, 2, 3, 64, torch.float32)])
    tried = {
        row["method"]: "ms_per_step" in row for row in record.steps[0]["rows"] if "method" in row
    }
    assert list(tried.values()) == [True, False, True, True]


def test_wrong_results_fail_the_step_and_are_not_timed(tmp_path, monkeypatch):
    right = SERVED.dense_decode
    monkeypatch.setattr(SERVED, "dense_decode", lambda *args: right(*args) + 1)
    code, found = run(tmp_path, "--only", "attention")
    (step,) = found["steps"]
    assert code == 1 and step["status"] == "failed" and "dense_decode" in step["why"]
    (row,) = [row for row in step["rows"] if row.get("method") == "dense_decode"]
    assert "wrong, error" in row["refused"] and "us" not in row


def test_an_update_that_does_nothing_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(SERVED, "update_page_summary", lambda *args, **kind: None)
    _, found = run(tmp_path, "--only", "attention")
    rows = {row.get("method"): row for row in found["steps"][0]["rows"]}
    for setting in SETTINGS:
        assert "makes another row" in rows[f"{setting.name}/update"]["refused"]
        assert "us" in rows[setting.name]


def test_timed_steps_make_one_row_at_most():
    steps = make_steps(TINY[0], SETTINGS)
    for setting in SETTINGS:
        for method in quest_methods(setting, steps, TINY[0]):
            ops.reset_counters()
            method.call(steps[0])
            assert ops.counters()["pages_sealed"] <= TINY[0].layer.num_kv_heads, method.key


def test_peers_and_the_default_come_first_of_all_workloads(tmp_path):
    record = Record(tmp_path, 600.0, {})

    def measure(record):
        run_attention(record, "cpu", TINY, SETTINGS[:2], peers_of)

    record.run(Step("attention", "Attention", 1, measure))
    rows = [row for row in record.steps[0]["rows"] if "us" in row]
    order = [(row["workload"], row["method"].startswith("quest-")) for row in rows]
    assert list(dict.fromkeys(order)) == [
        (workload.name, is_later) for is_later in (False, True) for workload in TINY
    ]
    assert rows[0]["method"].startswith("sdpa")


@pytest.mark.parametrize("served", ["native", "triton", "torch"])
def test_triton_is_measured_with_its_default_unless_it_serves(served, monkeypatch):
    monkeypatch.setattr(attention.ops, "provider_of", lambda name: served)
    first, later = (
        [(x.kernels, x.settings) for x in parts] for parts in own_parts("cuda", SETTINGS)
    )
    default, rest = tuple(SETTINGS[:1]), (served, tuple(SETTINGS[1:]))
    assert first == [(served, default)]
    assert later == [rest, ("triton", default)] if served == "native" else [rest]


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [(Setting("quest-top_p", 192), "top_p", 0.3), (Setting(budget=0.5), "budget_fraction", 0.3)],
)
def test_a_way_to_select_that_is_not_heeded_is_not_timed(
    tmp_path, monkeypatch, setting, name, value
):
    right = SERVED.sparse_decode
    monkeypatch.setattr(
        SERVED, "sparse_decode", lambda *x, **settings: right(*x, **settings | {name: value})
    )
    record = Record(tmp_path, 600.0, {})

    def measure(record):
        run_attention(record, "cpu", TINY[:1], [setting], lambda *_: [])

    record.run(Step("attention", "Attention", 1, measure))
    rows = {row.get("method"): row for row in record.steps[0]["rows"]}
    assert record.has_failures and "wrong, error" in rows[setting.name]["refused"]
    assert "us" in rows[f"{setting.name}/attend"]


def test_steps_are_skipped_when_time_is_short_and_failures_stop_nothing(tmp_path):
    def fails(record):
        record.add(value=1)
        raise StepFailedError("as planned")

    def breaks(record):
        raise RuntimeError("unexpected")

    record = Record(tmp_path, 600.0, {})
    for step in (
        Step("fails", "Fails", 1, fails),
        Step("breaks", "Breaks", 1, breaks),
        Step("long", "Long", 6000, fails),
        Step("short", "Short", 1, lambda record: record.add(value=2)),
    ):
        record.run(step)
    found = json.loads((tmp_path / "gpu-check.json").read_text("utf-8"))["steps"]
    assert [step["status"] for step in found] == ["failed", "failed", "skipped", "ok"]
    assert [step["rows"] for step in found] == [[{"value": 1}], [], [], [{"value": 2}]]
    assert "unexpected" in found[1]["why"] and record.has_failures


def test_decoding_comes_first_of_the_gpu_tests_and_none_is_left_out():
    paths = [ROOT / path for path in checks.test_paths(ROOT, "cuda")]
    for_gpus = {
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.cuda|^def test_.*\bdevice\b", path.read_text("utf-8"), re.MULTILINE)
        and path.parts[-2:] != ("bench", "test_gpu_check.py")
    }
    assert all(any(path.is_relative_to(given) for given in paths) for path in for_gpus)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "cuda and not nightly"]
    listed = subprocess.run([*command, *paths], cwd=ROOT, text=True, capture_output=True).stdout
    files = [line.split("::")[0] for line in listed.splitlines() if "::" in line]
    order = list(dict.fromkeys(files))
    assert order[:3] == ["tests/test_cuda.py", "tests/test_cuda_decode.py", GPU_FILES[0]]
    assert GPU_FILES and set(GPU_FILES) <= set(order)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert bench_gpu_check.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_parts_and_other_kernels_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu_check, "record_folder", lambda name: tmp_path / name)
    for kernels in ("", "triton"):
        monkeypatch.setenv("QUEST_COMPILE_CUDA_KERNELS", kernels)
        for only in ("sanitizer", "sanitizer,flashinfer"):
            bench_gpu_check.main(["--device", "cpu", "--only", only])
    names = ["sanitizer", "sanitizer-flashinfer"]
    names += [f"triton-{name}" for name in names]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"gpu-check-{name}" for name in names]


def test_the_plan_for_a_gpu_fits_its_time_and_its_list_runs_nothing(capsys):
    assert bench_gpu_check.main(["--list"]) == 0
    assert "end-to-end" in capsys.readouterr().out
    assert sum(step.seconds for step in steps_of("cuda")) <= 8 * 60


def test_rows_of_flashinfer_are_right(monkeypatch, tmp_path):
    """With the plain-torch stand-in for FlashInfer, of head_dim 64."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    monkeypatch.setattr(flashinfer_peer, "_WORKSPACE_BYTES", 1024)
    shape = dataclasses.replace(SHAPES["tiny"], layer=Layer(8, 2, 64))
    monkeypatch.setitem(SHAPES, "tiny", shape)
    workload = Workload.of_shape("tiny", 256, 2, "cpu")

    def measure(record):
        peers = flashinfer_peer.peers_of
        run_attention(record, "cpu", [workload], [Setting()], peers, has_own=False)

    record = Record(tmp_path, 600.0, {})
    record.run(Step("flashinfer", "FlashInfer", 1, measure))
    timed = [row["method"] for row in record.steps[-1]["rows"] if "us" in row]
    assert timed == ["flashinfer", "flashinfer, pages"]
