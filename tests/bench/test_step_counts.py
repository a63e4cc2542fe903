"""What a step read: by the counters, and by report and settings where a replayed graph calls no
operator. A CPU stands in for the GPU: its counters are taken away."""

import pytest
import torch

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.bench import bench_decode
from quest_compile.bench.decode import counts
from quest_compile.bench.decode.counts import reads_of
from quest_compile.bench.ops import checks, prove
from quest_compile.bench.ops import methods as ops_methods
from quest_compile.bench.ops.inputs import Workload, make_steps
from quest_compile.bench.results import RefusedError, load_results
from quest_compile.bench.settings import QUEST, Setting
from quest_compile.bench.shapes import Layer
from quest_compile.report import Report

ARGUMENTS = ["--model-shape", "tiny", "--contexts", "62", "--budgets", "64", "--dtype", "float32"]
ARGUMENTS += ["--methods", "dense_decode,quest_64", "--settings", "quest", "--no-llama-cpp"]
ARGUMENTS += ["--rounds", "3", "--max-load", "99"]
READ = ["sparse_calls_per_step", "dense_calls_per_step", "tokens_read_per_query"]
READ += ["kv_bytes_per_step", "bytes_moved"]

pytestmark = [
    pytest.mark.usefixtures("eager_decoding"),
    pytest.mark.skipif(not ops.native_status().loaded, reason="bench refuses to time plain torch"),
]


@pytest.fixture(autouse=True)
def _one_copy(monkeypatch):
    monkeypatch.setattr("quest_compile.bench.ops.inputs.ROTATED_BYTES", 1)


@pytest.fixture
def replayed(monkeypatch):
    """No counter moves, as when a CUDA graph is replayed."""
    zeros = dict.fromkeys(ops.counters(), 0)

    def apply():
        monkeypatch.setattr(counts, "are_counted", lambda device: False)
        monkeypatch.setattr(ops, "counters", lambda: dict(zeros))

    return apply


@pytest.mark.parametrize("kind", QUEST)
@pytest.mark.parametrize("seq_len", [63, 64, 65, 79, 80, 81])
def test_the_setting_says_what_the_counters_count(seq_len, kind):
    setting = Setting(kind, 64)
    workload = Workload("tiny", Layer(4, 2, 16), seq_len, torch.bfloat16, batch=2)
    step = make_steps(workload, [setting])[0]
    ops.reset_counters()
    ops_methods.sparse_decode(setting, seq_len)(step)
    counted = ops.counters()
    reads = reads_of(step.key_cache, step.value_cache, 4, seq_len, setting.config)
    assert reads.num_bytes == counted["bytes_read"]
    if seq_len > 64:
        assert reads.tokens == counted["tokens_attended"] / counted["sparse_rows"]
    else:
        assert counted["sparse_rows"] == 0 and reads.tokens == seq_len
    ops.reset_counters()
    ops_methods.dense_decode(step)
    dense = reads_of(step.key_cache, step.value_cache, 4, seq_len, None)
    assert dense.num_bytes == ops.counters()["bytes_read"]


def test_report_and_settings_say_what_the_counters_say(tmp_path, replayed):
    assert bench_decode.main([*ARGUMENTS, "--output", str(tmp_path / "counted")]) == 0
    replayed()
    assert bench_decode.main([*ARGUMENTS, "--output", str(tmp_path / "reported")]) == 0
    counted, reported = (
        {r.method: r.metadata for r in load_results(tmp_path / name)}
        for name in ("counted", "reported")
    )
    # Some steps fit the budget, some do not.
    assert 0 < counted["quest_64"]["sparse_calls_per_step"] < 2
    for method in ("dense_decode", "quest_64"):
        assert counted[method]["counted_by"] == "counters"
        assert reported[method]["counted_by"] == "report"
        for name in READ:
            assert counted[method][name] == reported[method][name], (method, name)


def test_a_report_without_sparse_layers_is_refused(tmp_path, replayed, monkeypatch, capsys):
    replayed()
    monkeypatch.setattr(QuestBackend, "report", lambda backend: Report([]))
    assert bench_decode.main([*ARGUMENTS, "--output", str(tmp_path)]) == 1
    assert "quest_64: 0 sparse calls" in capsys.readouterr().err
    assert {r.method for r in load_results(tmp_path)} == {"dense_decode", "read_loop"}


@pytest.mark.parametrize("name", ["quest_64", "dense_decode"])
def test_ops_take_bytes_from_the_setting_where_values_are_not_counted(name, monkeypatch):
    setting = Setting("quest", 64)
    workload = Workload("tiny", Layer(4, 2, 16), 250, torch.float32)
    steps = make_steps(workload, [setting])
    found = []
    for is_counted in (True, False):
        monkeypatch.setattr(prove, "are_values_counted", lambda step, is_=is_counted: is_)
        (method,) = (
            m for m in ops_methods.methods_of(workload, steps, [setting], [name]) if m.key == name
        )
        facts = prove.check_method(method, steps[0])
        found.append((facts, method.bytes_moved))
    assert found[0] == found[1]
    assert (found[0][1] < workload.dense_bytes) == (name == "quest_64")


def test_kernels_of_cuda_are_named_and_plain_torch_is_refused(monkeypatch):
    monkeypatch.setattr(ops, "cuda_kernels", lambda: "native")
    monkeypatch.setattr(ops, "provider_of", lambda name: "native")
    # Instruction sets are of CPUs.
    monkeypatch.setenv("QUEST_COMPILE_ISA", "nosuch")
    assert checks.check_kernels("cuda")["cuda_kernels"] == "native"
    slow = {"attend_pages": "torch"}
    monkeypatch.setattr(ops, "provider_of", lambda name: slow.get(name, "triton"))
    with pytest.raises(RefusedError, match="plain torch serves, not our kernels: attend_pages"):
        checks.check_kernels("cuda")
