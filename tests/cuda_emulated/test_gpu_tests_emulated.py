"""Tests for a GPU and checks of gpu-check on one that is not there: errors of their own show here,
a tensor left on the CPU or a wrong argument, and not in the few minutes that a GPU is at hand."""

import dataclasses
import sys
from pathlib import Path

import emulated_library
import gpu_stand_in
import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("gpu", "ops")]

import test_gpu_kernels as kernels
import test_gpu_selection as selection
from hostile import CASES, FORMATS, Case, make_inputs

from quest_compile import ops
from quest_compile.bench.gpu_check import smoke
from quest_compile.bench.ops.inputs import Workload, make_steps
from quest_compile.bench.ops.methods import quest_methods
from quest_compile.bench.ops.prove import check_method
from quest_compile.bench.settings import QUEST, Setting

FEW_CASES = kernels.FEW_CASES
SHARES = selection.SHARES[2]
nightly = pytest.mark.nightly


@pytest.fixture(autouse=True)
def emulated(library, monkeypatch):
    """CPU tensors keep their kernels."""
    with emulated_library.serving_cpu_tensors(library):
        pass
    emulated_library.configure()
    gpu_stand_in.install(monkeypatch)
    with gpu_stand_in.StandIn():
        yield


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (kernels.test_repeated_calls_give_the_same_bits, ("sparse_decode_step", FEW_CASES[0])),
        (kernels.test_rest_of_the_batch_changes_no_bit, ("sparse_decode", FEW_CASES[0])),
        (kernels.test_summaries_have_the_bits_of_the_cpu, (CASES[2],)),
        (kernels.test_a_repeated_step_gives_the_same_bits, (CASES[2],)),
        (kernels.test_lengths_out_of_range_are_clamped, (-5,)),
        (selection.test_selects_the_pages_of_the_cpu, (50, "shares", SHARES)),
        (selection.test_sparse_decode_attends_what_is_chosen, (CASES[2], SHARES)),
        pytest.param(kernels.test_foreign_writes_are_repaired, (FORMATS[0],), marks=nightly),
        pytest.param(
            kernels.test_a_captured_step_follows_the_lengths_in_device_memory,
            (FORMATS[0],),
            marks=nightly,
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gpu_test_runs(test, arguments):
    test(*arguments)


def test_smoke_runs_on_cuda_tensors(monkeypatch):
    monkeypatch.setattr(smoke, "_CASES", smoke._CASES[1:2])
    rows = smoke.smoke("cuda", {"native": ops})
    assert len(rows) == 28 and all(row["ok"] for row in rows)


@pytest.mark.parametrize("kind", QUEST)
def test_attention_is_checked_on_cuda_tensors(kind):
    setting, workload = Setting(kind, 64), Workload.of_shape("tiny", 256, 2, "cpu")
    step = on_cuda(make_steps(workload, [setting], 2**28)[0])
    for method in quest_methods(setting, [step], workload):
        check_method(method, step)


def on_cuda(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {name: on_cuda(x) for name, x in value.items()}
    if dataclasses.is_dataclass(value):
        return type(value)(**{name: on_cuda(x) for name, x in vars(value).items()})
    return value


def test_a_tensor_of_the_cpu_is_refused():
    inputs = make_inputs(Case(torch.bfloat16), "cuda")
    assert ops.dense_decode(*inputs.dense()).is_cuda
    query, keys, values, lengths, _ = inputs.dense()
    with pytest.raises(RuntimeError, match="on the CPU"):
        query + query.cpu()
    with pytest.raises(ValueError, match="value_cache: expected device cuda:0, got cpu"):
        ops.dense_decode(query, keys, values.cpu(), lengths)


def test_a_captured_call_changes_nothing_before_it_is_replayed():
    total, one = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = total.add_(one) * 2
    assert total.tolist() == [0, 0, 0]
    for _ in range(2):
        graph.replay()
    assert total.tolist() == [2, 2, 2] and twice.tolist() == [4, 4, 4]
