"""Shared by all tests: seeds, devices, and which kernels serve."""

import pytest
import torch

from quest_compile import ops


def pytest_report_header():
    status = ops.native_status()
    why = f" ({status.reason})" if status.reason else ""
    return f"quest_compile: {status.info}{why}, torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture
def serves_natively():
    """Whether the native library serves CPU tensors, and not the plain-torch reference."""
    return ops.native_status().loaded


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory, of torch.empty and of native outputs, is full of NaN."""
    mode = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill
