"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
# Most of it is compiling: minutes.

import os
import subprocess
import sys
from pathlib import Path

import emulated_library
import pytest

FOLDER = Path(__file__).parent
# Every kernel, memory that is not aligned, lengths outside of the cache.
EVERY_KERNEL = (
    "test_emulated_shapes.py",
    "test_emulated_kernels.py::test_rows_at_any_address_give_the_same_bits",
    "test_emulated_kernels.py::test_lengths_and_positions_out_of_range_are_clamped",
)
# Little, but every dtype and layout: sanitized fibers are slow.
CHOSEN = (
    "best_pages or step_is_update or bit_for_bit or foreign or clamped or any_address or "
    "little_shared or selects_as_the_contract or is_the_definition or listed_pages or "
    "changes_a_bit or more_heads"
)
PLANTED = """
import emulated_library, os, planted_errors
with emulated_library.serving_cpu_tensors(os.environ["QUEST_COMPILE_EMULATED_LIBRARY"]):
    planted_errors.overrun()
"""

pytestmark = pytest.mark.nightly


@pytest.fixture(autouse=True)
def emulated():
    """Nothing is emulated in this process."""


@pytest.fixture(scope="module")
def run():
    """Run Python in a process with sanitizers, in which the sanitized kernels are emulated."""
    library = emulated_library.build(emulated_library.SANITIZED)
    preloaded = [file_of_compiler(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if None in preloaded:
        pytest.skip("no sanitizer libraries")
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    path = [str(FOLDER), str(FOLDER.parent / "support"), environment.get("PYTHONPATH", "")]
    environment |= {
        "QUEST_COMPILE_EMULATED_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(path),
    }

    def call(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=FOLDER, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def file_of_compiler(name):
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


def assert_passes(run, *arguments):
    code, output = run("-m", "pytest", "-x", "-q", "-p", "no:xdist", *arguments)
    assert code == 0 and " passed" in output, output[-5000:]


def test_read_behind_a_cache_is_noticed(run):
    code, output = run("-c", PLANTED)
    assert code != 0 and "before" in output and "not noticed" not in output
    assert "AddressSanitizer: heap-buffer-overflow" in output and "quest::cuda::" in output


def test_every_kernel_touches_its_own_memory_only(run):
    assert_passes(run, *EVERY_KERNEL)


def test_kernels_touch_no_memory_that_is_not_theirs(run):
    names = ("operators", "kernels", "selection")
    assert_passes(run, *(f"test_emulated_{name}.py" for name in names), "-k", CHOSEN)
