"""Kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, at every level.

Each instruction-set level has a process of its own, in which operator tests run with the
sanitizers preloaded.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "sanitized"
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "neon")
TESTS = (
    "tests/ops/test_fuzz.py",
    "tests/ops/test_update_page_summary.py",
    "tests/ops/test_linear_decode.py",
)
NUM_CALLS = 20


def compiler_file(name):
    """Path of a file that comes with the compiler, as it is built with; None without one."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    command = [*compiler.split(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.fixture(scope="module")
def preloaded():
    # Behind the sanitizer the library that throws: it looks for that at the start.
    paths = [compiler_file(name) for name in ("libasan.so", "libstdc++.so")]
    if None in paths:
        pytest.skip("no C++ compiler with libasan.so")
    return " ".join(paths)


@pytest.fixture(scope="module")
def library(preloaded):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    settings = ["-DCMAKE_BUILD_TYPE=Debug", "-DQUEST_COMPILE_SANITIZE=address,undefined"]
    settings.append(f"-DPython_EXECUTABLE={sys.executable}")
    environment = {**os.environ, "PATH": path, "QUEST_COMPILE_CUDA": "0"}
    for command in (
        [cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", *settings],
        [cmake, "--build", BUILD, "--parallel", "2"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "libquest.so"


# Those that not every CPU has: nightly.
@pytest.fixture(
    params=[
        pytest.param(level, marks=() if level in ("scalar", "avx2") else pytest.mark.nightly)
        for level in LEVELS
    ]
)
def run(request, library, preloaded):
    """Run a program in a process with sanitizers."""
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment = inherited | {
        "QUEST_COMPILE_LIBRARY": str(library),
        "QUEST_COMPILE_ISA": request.param,
        "QUEST_COMPILE_FUZZ": str(NUM_CALLS),
        "LD_PRELOAD": preloaded,
        # Python leaks at exit. New memory is full of NaN.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }

    def call(*arguments):
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, errors="replace"
        )
        output = done.stdout + done.stderr
        if "expected an instruction-set level of this build and CPU" in output:
            pytest.skip(f"no {request.param} kernels or not that CPU")
        return done.returncode, output

    call.level = request.param
    return call


def test_read_behind_a_cache_is_noticed(run):
    code, output = run("tests/support/planted_errors.py", "overrun")
    assert code != 0 and "before" in output and "not noticed" not in output
    assert "AddressSanitizer: heap-buffer-overflow" in output
    assert f"quest::{run.level}::" in output


@pytest.mark.parametrize("run", LEVELS[:1], indirect=True)
def test_undefined_behaviour_is_noticed(run):
    code, output = run("tests/support/planted_errors.py", "misaligned")
    assert code != 0 and "before" in output and "not noticed" not in output
    assert "runtime error: load of misaligned address" in output


def test_operators_make_no_error(run):
    options = ["-m", "not nightly and not inductor", "-k", "not opcheck", "-p", "no:cacheprovider"]
    code, output = run("-m", "pytest", "-x", "-p", "no:xdist", *options, *TESTS)
    assert code == 0, output[-20_000:]
    assert f"quest_compile: cpu:{run.level}," in output
