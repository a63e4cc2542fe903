"""What a result must carry: machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from quest_compile import __version__, ops

_COMMIT_VARIABLE = "QUEST_COMPILE_COMMIT"


def identity() -> dict[str, Any]:
    """The conditions of a measurement, JSON-able; names of pyperf where it has one."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = {
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "commit": commit(),
        "cpu_model_name": cpu_name(),
        "cpu_count": os.cpu_count(),
        "load_avg_1min": load,
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "quest_compile": __version__,
        "kernels": ops.native_status().info,
        "instruction_set": instruction_set(),
    }
    if torch.cuda.is_available():
        found["cuda_device"] = torch.cuda.get_device_name()
        found["cuda_kernels"] = ops.cuda_kernels()
    return found


def instruction_set() -> str:
    """Of the CPU kernels that serve, such as "avx2"; "torch" where none do."""
    found = re.search(r"cpu:(\w+)", ops.native_status().info)
    return found[1] if found else "torch"


def commit() -> str:
    """The short commit; "+changes" when files that are measured differ from it.

    Where there is no git, that of the environment variable QUEST_COMPILE_COMMIT.
    """
    try:
        head = _git("rev-parse", "--short", "HEAD").strip()
        # Results and notes are not measured.
        measured = ["csrc", "quest_compile", "passes", "bench/*.py", "bench/**/*.py"]
        dirty = _git("status", "--porcelain", "--", *measured)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(_COMMIT_VARIABLE, "unknown")
    return head + ("+changes" if dirty.strip() else "")


def _git(*arguments: str) -> str:
    root = str(Path(__file__).resolve().parents[1])
    command = ["git", "-C", root, *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
