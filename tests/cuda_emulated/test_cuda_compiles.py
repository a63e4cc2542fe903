"""What nvcc made of the kernels: of the library that is in use, not compiled again."""

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from quest_compile import ops
from quest_compile.ops import native

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# One CTA of 256 threads per SM; more than 255 there are not.
MOST_REGISTERS = {
    "attend_kernel": 232,
    "score_kernelINS0_6MinMax": 128,
    "score_kernelINS0_6Sketch": 200,
    "select_kernel": 96,
}
FEW_REGISTERS = 128
NUM_INSTANCES = {
    "attend_kernel": 9,
    "score_kernelINS0_6MinMax": 3,
    "score_kernelINS0_6Sketch": 3,
    "finish_kernel": 1,
    "select_kernel": 1,
    "share_kernel": 1,
}
MOST_BYTES = 50e6
# Of bfloat16: to fetch 20208 and 12040 instructions took most of the time. A fifth of those of
# sketches serve warps that have parted, which none has.
MOST_INSTRUCTIONS = {
    "score_kernelINS0_6MinMaxINS0_8BFloat16EEEE": 3500,
    "score_kernelINS0_6SketchINS0_8BFloat16EEEE": 7000,
    "attend_kernelINS0_8BFloat16ENS0_10MatrixWarpIS2_Li128EEEEE": 7000,
}


@pytest.fixture(autouse=True)
def emulated():
    """Nothing is emulated here."""


@pytest.fixture(scope="module")
def library():
    if "cuda:" not in ops.native_status().info:
        pytest.skip(f"the native library has no CUDA kernels: {ops.native_status()}")
    path = os.environ.get("QUEST_COMPILE_LIBRARY")
    return Path(path) if path else native._find()


@pytest.fixture(scope="module")
def resources(library):
    """Per architecture and kernel: REG, STACK, LOCAL."""
    found = {}
    architecture = None
    for line in cuobjdump("--dump-resource-usage", library).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            values = {key: int(x) for key, x in re.findall(r"(\w+):(\d+)", line)}
            found.setdefault((architecture, name), values)
    return found


def cuobjdump(option, library, *more):
    """What it prints."""
    command = [path_of_cuobjdump(), option, *more, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def path_of_cuobjdump():
    if path := shutil.which("cuobjdump"):
        return path
    spec = find_spec("triton")
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    if not path.is_file():
        pytest.skip("no cuobjdump: neither a CUDA toolkit nor triton has it here")
    return str(path)


def stem_of(name):
    return next((stem for stem in NUM_INSTANCES if stem in name), None)


def test_library_is_small(library):
    assert library.stat().st_size < MOST_BYTES


def test_every_file_has_code_for_both_and_ptx_for_newer_gpus(library):
    num_files = len(list(CUDA.glob("*.cu")))
    assert architectures("elf", library) == {"sm_80": num_files, "sm_90": num_files}
    assert architectures("ptx", library) == {"sm_90": num_files}


def architectures(kind, library):
    """Of the ELF images or PTX texts of the library, and how many."""
    listing = cuobjdump(f"--list-{kind}", library)
    return Counter(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)$", listing, re.MULTILINE))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_instance_is_there(resources, architecture):
    names = [stem_of(name) for arch, name in resources if arch == architecture]
    assert {stem: names.count(stem) for stem in NUM_INSTANCES} == NUM_INSTANCES


def test_no_kernel_spills(resources):
    spills = {
        key: values
        for key, values in resources.items()
        if stem_of(key[1]) and (values["STACK"] or values["LOCAL"])
    }
    assert not spills


def test_registers_leave_room_for_the_ctas(resources):
    many = {
        key: values["REG"]
        for key, values in resources.items()
        if (stem := stem_of(key[1])) and values["REG"] > MOST_REGISTERS.get(stem, FEW_REGISTERS)
    }
    assert not many


@pytest.mark.parametrize("stem", MOST_INSTRUCTIONS)
def test_a_decode_step_is_little_code(library, resources, stem):
    (name,) = {name for _, name in resources if stem in name}
    _, *texts = cuobjdump("--dump-sass", library, "--function", name).split("Function : ")
    counts = [len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", text, re.MULTILINE)) for text in texts]
    assert counts and all(0 < count < MOST_INSTRUCTIONS[stem] for count in counts)
