import os
import sys
from pathlib import Path

import emulated_library
import pytest

sys.path.append(str(Path(__file__).parents[1] / "ops"))


@pytest.fixture(scope="session")
def library():
    sanitized = os.environ.get("QUEST_COMPILE_EMULATED_LIBRARY")
    return sanitized or emulated_library.build(emulated_library.OPTIMISED)


@pytest.fixture(scope="module")
def serving(library):
    with emulated_library.serving_cpu_tensors(library):
        yield


@pytest.fixture(autouse=True)
def emulated(serving, poisoned_memory):
    emulated_library.configure()


@pytest.fixture
def device(request):
    """Of the operator tests that run here too."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("summary") == "meanstd":
        pytest.skip("no CUDA kernel reads it: see test_summary_is_refused")
    return "cpu"
