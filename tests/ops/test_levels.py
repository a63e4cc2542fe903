"""Summaries, scores, selections and linear layers with the kernels of every instruction set that
this machine and build have.

A process picks its kernels at its first call and keeps them: each level has one of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quest_compile import ops
from quest_compile.bench.parsers import LEVELS

FOLDER = Path(__file__).parent
TESTS = (
    "test_update_page_summary.py",
    "test_score_pages.py",
    "test_select_pages.py",
    "test_selection_shares.py",
    "test_linear_decode.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_passes(level, serves_natively):
    if not serves_natively:
        pytest.skip("no native library")
    if ops.native_status().info.split()[0] == f"cpu:{level}":
        pytest.skip("the level of this process, which these tests run at anyway")
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(FOLDER / name for name in TESTS)],
        env=inherited | {"QUEST_COMPILE_ISA": level},
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    if "expected an instruction-set level of this build and CPU" in output:
        pytest.skip(f"no {level} kernels or not that CPU")
    assert done.returncode == 0, output[-20_000:]
    assert f"quest_compile: cpu:{level}" in output
