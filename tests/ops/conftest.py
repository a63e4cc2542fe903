import pytest
import torch


@pytest.fixture(autouse=True)
def _poison(poisoned_memory):
    """An output that is not fully written, or scratch that is read too early, shows as NaN."""


@pytest.fixture(autouse=True)
def _keep_number_of_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
