"""Find and run commands that may take too long."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
from pathlib import Path


def cuda_tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit, which need not be on the PATH."""
    places = ["/usr/local/cuda/bin", os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    places += map(str, Path("/opt/nvidia/nsight-compute").glob("*"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


@dataclasses.dataclass(frozen=True)
class Done:
    """``output`` of both streams, as far as it came."""

    output: str
    returncode: int
    timed_out: bool


def run_logged(
    command: list[str],
    limit: float,
    log: Path,
    *,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    grace: float = 0,
) -> Done:
    """Output goes to ``log`` as it comes. After ``limit`` seconds a command is interrupted and has
    ``grace`` seconds to end; then it and all that it started are killed.

    What is installed runs, not a checkout that happens to be the current folder.
    """
    variables = (environment or os.environ) | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True
        )  # fmt: skip
    timed_out = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        _end(process, grace)
    except BaseException:
        _end(process, 0)
        raise
    output = log.read_text("utf-8", errors="replace")
    return Done(output, process.returncode, timed_out)


def _end(process: subprocess.Popen, grace: float) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
