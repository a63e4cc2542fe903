import pytest


@pytest.fixture(autouse=True)
def _poison(poisoned_memory):
    """An output that is not fully written, or scratch that is read too early, shows as NaN."""
