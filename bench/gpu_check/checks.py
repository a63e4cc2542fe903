"""The steps of gpu-check that measure nothing: environment, results, tests, compute-sanitizer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from quest_compile import ops
from quest_compile.bench import gpu_check
from quest_compile.bench.gpu_check import flashinfer_peer
from quest_compile.bench.gpu_check.record import Record, StepFailedError, StepSkippedError
from quest_compile.bench.gpu_check.smoke import smoke
from quest_compile.bench.gpu_check.timing import copy_bandwidth

# The name of the step that such a process runs.
FLASHINFER_ROWS = "flashinfer-rows"
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
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider"]
        command += ["--tb=short", "-rf", "--maxfail=20", "--durations=5", *test_paths(root, device)]
        variables = os.environ | {"QUEST_COMPILE_CUDA_KERNELS": provider}
        done = _run(command, limit, root, variables)
        (record.folder / f"tests-{provider}.log").write_text(done.stdout, "utf-8")
        failures = re.findall(r"(?m)^(?:FAILED|ERROR) .*", done.stdout)[:20]
        outcome = _last_line(done.stdout).strip("= ") or "no summary"
        if done.timed_out:
            outcome = f"stopped after {limit:.0f} s, {done.stdout.count('.')} passed or more"
        record.add(kernels=provider, outcome=outcome)
        for line in failures:
            record.add(kernels=provider, failed=line[:160])
        if not done.timed_out and done.returncode not in (0, 5):
            failed.append(f"{provider}: pytest ended with {done.returncode}")
    if failed:
        raise StepFailedError(f"{'; '.join(failed)}; see the logs")


def test_paths(root: Path, device: str) -> list[str]:
    """In this order. Within a folder of the list, a file of the list would lose its place."""
    if device == "cpu":
        return ["tests/test_cuda_graphs.py"]
    return [*map(str, sorted(root.glob("tests/test_cuda*.py"))), "tests/gpu", "tests/ops"]


def sanitizer(record: Record, device: str) -> None:
    """compute-sanitizer on the operators: bad addresses, then races of shared memory."""
    tool = _sanitizer()
    if tool is None or device != "cuda":
        raise StepSkippedError(
            "compute-sanitizer is not installed" if device == "cuda" else "no GPU"
        )
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for check in ("memcheck", "racecheck"):
        limit = min(60.0, record.seconds_left() - 5)
        if limit < 30:
            record.add(tool=check, skipped=f"{record.seconds_left():.0f} s left")
            continue
        command = [tool, "--tool", check, "--error-exitcode", "77", sys.executable, "-m"]
        start = time.monotonic()
        done = _run([*command, smoke.__module__, "cuda"], limit, None, environment)
        (record.folder / f"{check}.log").write_text(done.stdout, "utf-8")
        summary = re.findall(r"={9} (.*SUMMARY.*)", done.stdout)
        outcome = "not finished" if done.timed_out else f"exit {done.returncode}"
        record.add(
            tool=check, outcome=outcome, summary="; ".join(summary)[:120],
            seconds=round(time.monotonic() - start)
        )  # fmt: skip
        if done.returncode and not done.timed_out:
            failed.append(check)
    if failed:
        raise StepFailedError(f"{', '.join(failed)}; see the logs")


def flashinfer(record: Record, device: str) -> None:
    """FlashInfer's rows, in a process of its own: it may compile kernels for minutes."""
    if not flashinfer_peer.is_installed() or device != "cuda":
        raise StepSkippedError("flashinfer is not installed (quest_compile[flashinfer])")
    folder, limit = record.folder / "flashinfer", record.seconds_left() - 5
    command = [sys.executable, "-m", "quest_compile.bench", "gpu-check", "--output", str(folder)]
    done = _run([*command, "--only", FLASHINFER_ROWS, "--minutes", str(limit / 60)], limit, None)
    (record.folder / "flashinfer.log").write_text(done.stdout, "utf-8")
    if (path := folder / "gpu-check.json").is_file():
        for row in json.loads(path.read_text("utf-8"))["steps"][0]["rows"]:
            record.add(**row)
    if done.timed_out:
        raise StepSkippedError(f"not finished after {limit:.0f} s; see flashinfer.log")


def _sanitizer() -> str | None:
    places = ["/usr/local/cuda/bin", os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


class _Done:
    def __init__(self, stdout: str, returncode: int, timed_out: bool) -> None:
        self.stdout, self.returncode, self.timed_out = stdout, returncode, timed_out


def _run(
    command: list[str], limit: float, folder: Path | None, environment: dict | None = None
) -> _Done:
    """Output of both streams; after ``limit`` seconds a command and all it started are ended.

    What is installed runs, not a checkout that happens to be the current folder.
    """
    variables = (environment or os.environ) | {"PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True
    )  # fmt: skip
    try:
        stdout, _ = process.communicate(timeout=limit)
        return _Done(stdout, process.returncode, False)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, _ = process.communicate()
        return _Done(stdout or "", process.returncode, True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped)", line)]
    return lines[-1] if lines else ""


def _output_of(*command: str) -> str:
    try:
        return subprocess.check_output(command, text=True, timeout=20).strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
