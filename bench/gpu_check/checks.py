"""The steps of gpu-check that measure nothing: environment, results, tests, compute-sanitizer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from quest_compile import ops
from quest_compile.bench import gpu_check
from quest_compile.bench.gpu_check import flashinfer_peer
from quest_compile.bench.gpu_check.record import Record, StepFailedError, StepSkippedError
from quest_compile.bench.gpu_check.run_logged import cuda_tool, run_logged
from quest_compile.bench.gpu_check.smoke import smoke
from quest_compile.bench.gpu_check.timing import copy_bandwidth

# The name of the step that such a process runs.
FLASHINFER_ROWS = "flashinfer-rows"
_CHECKS = ("memcheck", "racecheck", "synccheck")
# Parts of the names of our CUDA kernels.
_KERNELS = ("score_kernel", "share_kernel", "select_kernel", "attend_kernel", "finish_kernel")
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "numpy", "pytest")


def environment(record: Record, device: str) -> None:
    for name in _PACKAGES:
        try:
            record.add(what=name, found=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            record.add(what=name, found="none")
    record.add(what="CPU kernels", found=ops.native_status().info)
    record.add(what="CUDA kernels", found=ops.cuda_kernels())
    record.add(what="compute-sanitizer", found=_sanitizer() or "none")
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        record.add(what="GPU", found=f"{p.name}, sm_{p.major}{p.minor}")
        record.add(what="multiprocessors", found=p.multi_processor_count)
        record.add(what="memory", found=f"{p.total_memory / 2**30:.1f} GiB")
        record.add(what="L2", found=f"{p.L2_cache_size / 2**20:.0f} MiB")
        record.add(what="CUDA of torch", found=torch.version.cuda)
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record.add(what="driver", found=driver)
    record.add(what="copy, GB/s", found=copy_bandwidth(device) / 1e9)


def results(record: Record, device: str) -> None:
    """Every operator, whichever kernels can serve, against plain torch."""
    rows = smoke(device)
    for row in rows:
        record.add(**row)
    wrong = [f"{row['operator']} [{row['kernels']}]" for row in rows if not row["ok"]]
    if wrong:
        raise StepFailedError(f"wrong: {', '.join(wrong)}")


def tests(record: Record, device: str) -> None:
    """The tests marked ``cuda``, where this runs from a checkout."""
    root = Path(gpu_check.__file__).resolve().parents[2]
    if not (root / "tests" / "conftest.py").is_file():
        raise StepSkippedError("no tests beside the package: not run from a checkout")
    if importlib.util.find_spec("pytest") is None:
        raise StepSkippedError("pytest is not installed")
    runs = [ops.provider_of("sparse_decode_step")]
    if device == "cuda":
        runs += ["triton"] if runs == ["native"] else []
    failed = []
    for provider in runs:
        longest = 100.0 if provider == runs[0] else 60.0
        limit = max(30.0, min(longest, record.seconds_left() * 0.3))
        marks = "cuda and not nightly" if device == "cuda" else "not nightly"
        command = [sys.executable, "-m", "pytest", "-v", "-m", marks, "-p", "no:cacheprovider"]
        command += ["--tb=short", "-rf", "--maxfail=20", "--durations=5", *_parallel()]
        variables = os.environ | {"QUEST_COMPILE_CUDA_KERNELS": provider, "OMP_NUM_THREADS": "1"}
        log = record.folder / f"tests-{provider}.log"
        # For the summary of pytest, which gives its workers 10 s to end.
        settings: dict[str, Any] = {"folder": root, "environment": variables, "grace": 15}
        done = run_logged([*command, *test_paths(root, device)], limit, log, **settings)
        outcome = _last_line(done.output).strip("= ") or "no summary"
        if done.timed_out:
            num_passed = len(re.findall(r"\bPASSED\b", done.output))
            outcome = f"stopped after {limit:.0f} s, {num_passed} passed"
        record.add(kernels=provider, outcome=outcome)
        failures = failures_in(done.output)
        for line in failures[:20]:
            record.add(kernels=provider, failed=line[:160])
        if failures or not done.timed_out and done.returncode not in (0, 5):
            why = (
                f"{len(failures)} failures" if failures else f"pytest ended with {done.returncode}"
            )
            failed.append(f"{provider}: {why}")
    if failed:
        raise StepFailedError(f"{'; '.join(failed)}; see the logs")


def _parallel() -> list[str]:
    """Options of pytest: worker processes, where xdist is installed."""
    num_workers = min(8, (os.cpu_count() or 1) // 2)
    has_xdist = importlib.util.find_spec("xdist") is not None
    return ["-n", str(num_workers)] if has_xdist and num_workers > 1 else []


def failures_in(log: str) -> list[str]:
    """Tests that failed, by the output of pytest -v, which may be cut: with why, if it got so far
    as to sum up."""
    summed_up = re.findall(r"(?m)^(?:FAILED|ERROR) (.*)$", log)
    verdicts = re.findall(
        r"(?m)^\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (.*?) *$"
        r"|^(\S+::.*?) (?:FAILED|ERROR) +\[ *\d+%\]$",
        log,
    )
    names = [by_worker or alone for by_worker, alone in verdicts]
    missing = [x for x in names if not any(f"{line} ".startswith(f"{x} ") for line in summed_up)]
    return list(dict.fromkeys(summed_up + missing))


def test_paths(root: Path, device: str) -> list[str]:
    """In this order. Within a folder of the list, a file of the list would lose its place."""
    if device == "cpu":
        return ["tests/test_cuda_graphs.py"]
    return [*map(str, sorted(root.glob("tests/test_cuda*.py"))), "tests/gpu", "tests/ops"]


def sanitizer(record: Record, device: str) -> None:
    """compute-sanitizer on our kernels: bad addresses, races of shared memory, barriers."""
    tool = _sanitizer()
    if tool is None or device != "cuda":
        raise StepSkippedError(
            "compute-sanitizer is not installed" if device == "cuda" else "no GPU"
        )
    if ops.provider_of("sparse_decode_step") != "native":
        raise StepSkippedError("no native CUDA kernels serve here")
    limit = min(90.0, record.seconds_left() - 5)
    if limit < 30:
        raise StepSkippedError(f"{record.seconds_left():.0f} s left")
    with ThreadPoolExecutor(len(_CHECKS)) as pool:
        start = time.monotonic()
        runs = {
            check: pool.submit(
                run_logged, sanitizer_command(tool, check), limit, record.folder / f"{check}.log",
                environment=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            )
            for check in _CHECKS
        }  # fmt: skip
        failed = []
        for check, run in runs.items():
            done = run.result()
            summary = re.findall(r"={9} (.*SUMMARY.*)", done.output)
            outcome = "not finished" if done.timed_out else f"exit {done.returncode}"
            record.add(
                tool=check, outcome=outcome, summary="; ".join(summary)[:120],
                seconds=round(time.monotonic() - start)
            )  # fmt: skip
            if done.returncode and not done.timed_out:
                failed.append(check)
    if failed:
        raise StepFailedError(f"{', '.join(failed)}; see the logs")


def sanitizer_command(tool: str, check: str) -> list[str]:
    """On our kernels only: those of torch take minutes."""
    command = [tool, "--tool", check, "--error-exitcode", "77"]
    for name in _KERNELS:
        command += ["--kernel-regex", f"kns={name}"]
    return [*command, sys.executable, "-m", smoke.__module__, "cuda", "native"]


def flashinfer(record: Record, device: str) -> None:
    """FlashInfer's rows, in a process of its own: it may compile kernels for minutes."""
    if not flashinfer_peer.is_installed() or device != "cuda":
        raise StepSkippedError("flashinfer is not installed (quest_compile[flashinfer])")
    folder, limit = record.folder / "flashinfer", record.seconds_left() - 5
    log = record.folder / "flashinfer.log"
    command = [sys.executable, "-m", "quest_compile.bench", "gpu-check", "--output", str(folder)]
    command += ["--only", FLASHINFER_ROWS, "--minutes", str(limit / 60)]
    done = run_logged(command, limit, log)
    if (path := folder / "gpu-check.json").is_file():
        for row in json.loads(path.read_text("utf-8"))["steps"][0]["rows"]:
            record.add(**row)
    if done.timed_out:
        raise StepSkippedError(f"not finished after {limit:.0f} s; see flashinfer.log")


def _sanitizer() -> str | None:
    return cuda_tool("compute-sanitizer")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped)", line)]
    return lines[-1] if lines else ""


def _output_of(*command: str) -> str:
    try:
        return subprocess.check_output(command, text=True, timeout=20).strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
