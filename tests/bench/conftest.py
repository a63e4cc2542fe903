"""Shared by the tests of benchmarks that run whole models."""

import pytest
import torch

from quest_compile.bench.decode import methods


@pytest.fixture
def eager_decoding(monkeypatch):
    """Nothing is compiled, little is read between rounds; torch's settings are put back."""
    limit, threads = torch._dynamo.config.recompile_limit, torch.get_num_threads()
    monkeypatch.setattr(methods, "inner_compiler", lambda *_: "eager")
    monkeypatch.setattr("quest_compile.bench.decode.measure._READ_BYTES", 2**20)
    torch._dynamo.reset()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch.set_num_threads(threads)
