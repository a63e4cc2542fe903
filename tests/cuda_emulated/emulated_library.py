"""The CUDA operators compiled as host C++ (csrc/cuda/emulation), registered for CPU tensors."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NAMES = (
    "update_page_summary",
    "score_pages",
    "select_pages",
    "attend_pages",
    "sparse_decode",
    "sparse_decode_step",
    "dense_decode",
)
SOURCES = ("cuda/*.cu", "cuda/*.cpp", "cuda/emulation/*.cpp", "*.cpp")
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -DQUEST_EMULATED -DTORCH_STABLE_ONLY "
    "-DTORCH_TARGET_VERSION=0x020A000000000000 -ffp-contract=off -fno-strict-aliasing "
    "-Wall -Wextra -Wno-unknown-pragmas"
).split()
OPTIMISED = ("-O2",)
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
_definitions = []


def build(flags):
    """Compile what changed since; returns the path of the library."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("the emulation of CUDA needs a C++ compiler on x86-64")
    sources = sorted(path for pattern in SOURCES for path in CSRC.glob(pattern))
    sources.remove(CSRC / "bindings.cpp")
    include = str(Path(torch.__file__).parent / "include")
    command = [compiler, *FLAGS, *flags, f"-I{CSRC}", "-isystem", include]
    folder = ROOT / "build" / f"emulated-{_hash(command, sources)}"
    library = folder / "libquest_emulated.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # of the workers one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(command, sources, library)
    return library


def _compile(command, sources, library):
    objects = library.parent / "objects"
    shutil.rmtree(objects, ignore_errors=True)
    objects.mkdir()

    def compile_one(source):
        out = objects / f"{source.name}.o"
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outs = list(pool.map(compile_one, sources))
    # libtorch first: the library has no other way to find it.
    libtorch = Path(torch.__file__).parent / "lib/libtorch.so"
    made = objects / library.name
    link = [*command, "-shared", *outs, "-Wl,--no-as-needed", libtorch, "-o", made]
    subprocess.run([str(x) for x in link], check=True)
    made.rename(library)
    shutil.rmtree(objects)


def _hash(command, sources):
    digest = hashlib.sha256(repr((command, torch.__version__)).encode())
    for path in (*sources, *sorted(CSRC.rglob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def serving_cpu_tensors(library):
    """The operators ``quest::*`` run the emulated CUDA kernels on CPU tensors."""
    if not _definitions:
        definition = torch.library.Library("quest_emulated", "FRAGMENT")
        for name in NAMES:
            schema = str(getattr(torch.ops.quest, name).default._schema)
            definition.define(schema.removeprefix("quest::"))
        _definitions.append(definition)
        torch.ops.load_library(str(library))
    overrides = torch.library.Library("quest", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name in NAMES:
            operator = getattr(torch.ops.quest_emulated, name).default
            overrides.impl(name, _forward_to(operator), "CPU", allow_override=True)
    try:
        yield
    finally:
        overrides._destroy()


def _forward_to(operator):
    return lambda *arguments, **settings: operator(*arguments, **settings)


def configure(num_sms=4, shared_bytes=227 << 10, seed=0):
    """The GPU to pretend; returns the number of launches since the last call."""
    return torch.ops.quest_emulated.configure(num_sms, shared_bytes, seed)
