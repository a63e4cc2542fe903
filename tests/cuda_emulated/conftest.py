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


@pytest.fixture(autouse=True)
def emulated(library, poisoned_memory):
    with emulated_library.serving_cpu_tensors(library):
        emulated_library.configure()
        yield


@pytest.fixture
def device():
    """Of the operator tests that run here too."""
    return "cpu"
