"""Copies of a cache start without page summaries and go their own way."""

import copy
import pickle

import pytest
import torch
from cache_runs import (
    LENGTH,
    MAX_SEQ_LEN,
    STEPS,
    assert_sparse_calls_since_reset,
    decode,
    fresh_run,
    grad_modes,
    is_exact,
)
from tiny_models import random_prompt

from quest_compile import ops, state
from quest_compile.decoding import prefill, rewind

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}


@grad_modes
@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_cache_is_on_its_own(model, step, mode, copied):
    if copied == "pickle" and mode is torch.inference_mode:
        mode = torch.no_grad  # torch cannot load a pickle under inference mode
    prompt = random_prompt(1, LENGTH)
    expected = fresh_run(model, step, prompt)
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, random_prompt(1, 1, seed=5), LENGTH - 1)
        twin = COPIES[copied](cache)
        assert not getattr(twin.layers[0].keys, state._ATTRIBUTE, None)
        for either in (cache, twin, cache):
            rewind(either, LENGTH - 1)
            ops.reset_counters()
            assert decode(step, either, prompt[:, -1:], LENGTH - 1) == expected
            assert_sparse_calls_since_reset(STEPS)
            assert is_exact([either])


def test_a_saved_cache_loads_and_is_on_its_own(model, step, tmp_path):
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        expected = decode(step, cache, prompt[:, -1:], LENGTH - 1)
        rewind(cache, LENGTH - 1)
        torch.save([(layer.keys, layer.values) for layer in cache.layers], tmp_path / "cache.pt")
        loaded = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        for layer, (keys, values) in zip(loaded.layers, torch.load(tmp_path / "cache.pt")):
            layer.keys, layer.values = keys, values
        assert decode(step, loaded, prompt[:, -1:], LENGTH - 1) == expected
