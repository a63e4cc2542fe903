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
def device():
    """Of the operator tests that run here too."""
    return "cpu"
