"""What names the machine of a result."""

import os
import re

import pytest
import torch

from quest_compile import identity, ops
from quest_compile.bench import records
from quest_compile.ops import NativeStatus


@pytest.mark.parametrize(
    ("info", "instruction_set"),
    [
        ("cpu:avx2", "avx2"),
        ("cpu:avx512_bf16 cuda:sm_80,sm_90", "avx512_bf16"),
        ("torch reference", "torch"),
    ],
)
def test_the_instruction_set_is_a_field_and_names_the_folder(info, instruction_set, monkeypatch):
    monkeypatch.setattr(ops, "native_status", lambda: NativeStatus(True, info, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(records, "cpu_name", lambda: "AMD EPYC 7B13 (x) Processor @ 2.45GHz")
    assert identity.identity()["instruction_set"] == instruction_set
    name = records.record_folder("ops").name
    machine = f"epyc-7b13-processor-{instruction_set}-{os.cpu_count()}-cores"
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_{machine}_.+_ops", name)


def test_where_there_is_no_git_the_commit_is_that_of_the_environment(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "quest_compile" / "identity.py"))
    assert identity.commit() == "unknown"
    monkeypatch.setenv("QUEST_COMPILE_COMMIT", "abc1234+changes")
    assert identity.commit() == "abc1234+changes"
    assert capfd.readouterr() == ("", "")


def test_cuda_kernels_are_a_field_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(ops, "cuda_kernels", lambda: "native")
    found = identity.identity()
    assert (found["cuda_device"], found["cuda_kernels"]) == ("GPU", "native")
    assert "_gpu_" in records.record_folder("ops").name
