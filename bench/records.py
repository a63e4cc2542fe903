"""Where results are kept, and how they are printed."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Any

import torch

from quest_compile.identity import commit, cpu_name, instruction_set

RESULTS = Path(__file__).resolve().parent / "results"


def record_folder(name: str) -> Path:
    """Where results of this machine and commit are kept: ``results/DATE_MACHINE_COMMIT_NAME``."""
    cpu = re.sub(r"\W+", "-", re.sub(r"\(.*?\)|\bAMD\b|\bIntel\b|CPU|@.*", "", cpu_name()))
    machine = f"{cpu.strip('-').lower()}-{instruction_set()}-{os.cpu_count()}-cores"
    if torch.cuda.is_available():
        machine = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    date = datetime.date.today().isoformat()
    return RESULTS / f"{date}_{machine}_{commit().replace('+', '-')}_{name}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print ``rows``, which share their keys, as an aligned table."""
    lines = [list(rows[0])] + [[_format(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
