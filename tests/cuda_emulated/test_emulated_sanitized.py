"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import emulated_library
import pytest

# Little, but every kernel, dtype and layout: sanitized fibers are slow.
CHOSEN = (
    "best_pages or step_is_update or bit_for_bit or foreign or clamped or any_address or "
    "little_shared or selects_as_the_contract or score_of_the_paper or listed_pages or "
    "changes_a_bit or masked_tokens_do_not or many_heads or spread_over"
)


def file_of_compiler(name):
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.nightly  # two minutes of CPU, most of them compiling
def test_kernels_touch_no_memory_that_is_not_theirs():
    library = emulated_library.build(emulated_library.SANITIZED)
    preloaded = [file_of_compiler(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if None in preloaded:
        pytest.skip("no sanitizer libraries")
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "QUEST_COMPILE_EMULATED_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    folder = Path(__file__).parent
    names = ("operators", "kernels", "sketches", "clusters")
    files = [str(folder / f"test_emulated_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", *files, "-k", CHOSEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert " passed" in done.stdout
