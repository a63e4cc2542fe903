"""gpu-check's steps that run other commands: pytest and compute-sanitizer."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from quest_compile import ops
from quest_compile.bench.gpu_check import checks
from quest_compile.bench.gpu_check.record import Record, Step
from quest_compile.bench.gpu_check.run_logged import run_logged

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


def test_command_that_takes_too_long_is_ended(tmp_path):
    start = time.monotonic()
    log = tmp_path / "log"
    # It does not heed the interrupt, and has started something.
    done = run_logged(["bash", "-c", "trap '' INT; sleep 60 & echo begun; wait"], 0.5, log, grace=1)
    assert done.timed_out and done.output == "begun\n" == log.read_text("utf-8")
    assert 1.5 <= time.monotonic() - start < 30


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "2"], marks=pytest.mark.nightly)])
def test_tests_that_are_stopped_name_what_failed(workers, tmp_path):
    """Also if pytest had no time to sum up."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('x', ['a', 'a b', 'slow'])\n"
        "def test(x):\n"
        "    time.sleep(600 * (x == 'slow'))\n"
        "    assert x == 'a'\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *workers]
    log = tmp_path / "log"
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = run_logged(command, 20, log, folder=tmp_path, environment=inherited, grace=60)
    assert done.timed_out and "1 failed, 1 passed" in done.output
    assert checks.failures_in(done.output) == [
        "test_it.py::test[a b] - AssertionError: assert 'a b' == 'a'"
    ]
    cut = done.output[: done.output.index("= FAILURES =")]
    assert checks.failures_in(cut) == ["test_it.py::test[a b]"]


def test_failures_are_found_in_any_output_of_pytest():
    log = """\
[gw0] [ 45%] FAILED tests/gpu/test_x.py::test_y[{'top_p': 0.9}]
[gw1] [ 46%] PASSED tests/gpu/test_x.py::test_y[FAILED]
[gw1] [100%] ERROR tests/gpu/test_x.py::test_y
tests/ops/test_z.py::test_z[a b] FAILED                     [  3%]
FAILED tests/gpu/test_x.py::test_y - assert 1 == 2
"""
    assert checks.failures_in(log) == [
        "tests/gpu/test_x.py::test_y - assert 1 == 2",
        "tests/gpu/test_x.py::test_y[{'top_p': 0.9}]",
        "tests/ops/test_z.py::test_z[a b]",
    ]


def test_sanitizer_runs_side_by_side_on_our_kernels(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    # Each waits for the two others to begin.
    tool.write_text(
        f'#!/bin/bash\necho "$@"; touch {tmp_path}/$2.began\n'
        f"until [ $(ls {tmp_path}/*.began | wc -l) = 3 ]; do sleep 0.1; done\n"
        "echo '========= ERROR SUMMARY: 0 errors'\n[ $2 != racecheck ] || exit 77\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(checks, "_sanitizer", lambda: str(tool))
    monkeypatch.setattr(ops, "provider_of", lambda name: "native")
    record = Record(tmp_path, 600.0, {})
    record.run(Step("sanitizer", "Sanitizer", 1, lambda record: checks.sanitizer(record, "cuda")))
    (step,) = record.steps
    assert step["status"] == "failed" and step["why"] == "racecheck; see the logs"
    assert [(row["tool"], row["outcome"]) for row in step["rows"]] == [
        ("memcheck", "exit 0"), ("racecheck", "exit 77"), ("synccheck", "exit 0")
    ]  # fmt: skip
    log = (tmp_path / "memcheck.log").read_text("utf-8")
    for name in ("score", "share", "select", "attend", "finish"):
        assert f"--kernel-regex kns={name}_kernel" in log
    assert "quest_compile.bench.gpu_check.smoke cuda native" in log


def test_kernels_of_our_own_are_in_the_list_of_the_sanitizer():
    text = "".join(path.read_text("utf-8") for path in CUDA.iterdir() if path.is_file())
    kernels = set(re.findall(r"\b(\w+_kernel)\(QUEST_PARAM", text))
    assert kernels and kernels <= set(checks._KERNELS)
