"""One model and one compiled step for all tests of cache states: compiling is most of the time."""

import pytest
import torch
from cache_runs import NUM_LAYERS, SETTINGS
from tiny_models import tiny_model

import quest_compile
from quest_compile import ops


@pytest.fixture(scope="session")
def model():
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="session")
def step(model):
    return torch.compile(model, backend=quest_compile.backend(**SETTINGS))


@pytest.fixture(autouse=True)
def _fresh():
    ops.reset_counters()
    # Grad modes, batch sizes, prefill and decode of all tests are graphs of one function.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
