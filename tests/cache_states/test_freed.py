"""Page summaries are freed with their cache, in one run and in many."""

import gc
import weakref

import pytest
import torch
from cache_runs import (
    LENGTH,
    MAX_SEQ_LEN,
    NUM_LAYERS,
    PAGE_FORMAT,
    SETTINGS,
    decode,
    grad_modes,
)
from tiny_models import random_prompt

import quest_compile
from quest_compile import ops, state
from quest_compile.decoding import prefill

LARGE_SEQ_LEN = 4096
NUM_WARM_UPS = 3
# Keys, values and summaries of one generation are 2.2 MB: a leak of all of them is 400 MB in 200.
GRANTED_GROWTH = 60e6


def test_page_summaries_die_with_their_cache(model, step):
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=1)
    states = [state.state_of(layer.keys, PAGE_FORMAT) for layer in cache.layers]
    summaries = [weakref.ref(state.page_summary) for state in states]
    del states
    assert all(summary() is not None for summary in summaries)
    del cache
    gc.collect()
    assert all(summary() is None for summary in summaries)


def test_replaced_key_tensors_take_their_summaries_along(model, step):
    """As ``reorder_cache`` does before every step of a beam search."""
    prompts = random_prompt(2, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompts[:, :-1], MAX_SEQ_LEN)
        before = count_states()
        for i in range(6):
            cache.reorder_cache(torch.tensor([1, 0]))
            decode(step, cache, prompts[:, -1:], LENGTH - 1 + i, steps=1)
    assert count_states() == before + NUM_LAYERS


@grad_modes
def test_twenty_generations_leave_nothing(model, mode):
    soak(model, mode, 20)


@pytest.mark.nightly
@grad_modes
def test_two_hundred_generations_leave_nothing(model, mode):
    soak(model, mode, 200)


def soak(model, mode, num_generations):
    """Each with a cache of its own, dropped without any gc.collect()."""
    step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
    with mode():
        for seed in range(NUM_WARM_UPS):
            generate_once(model, step, seed)
        gc.collect()
        states, tensors, resident = count_states(), count_tensors(), resident_bytes()
        ops.reset_counters()
        for seed in range(num_generations):
            generate_once(model, step, seed)
        assert ops.counters()["sparse_calls"] == num_generations * 4 * NUM_LAYERS
        assert count_states() == states
    gc.collect()
    assert count_tensors() == tensors
    assert resident_bytes() - resident < GRANTED_GROWTH


def generate_once(model, step, seed):
    prompt = random_prompt(1, LENGTH, seed=seed)
    cache = prefill(model, prompt[:, :-1], LARGE_SEQ_LEN)
    return decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=4)


def count_states():
    return sum(type(x) is state.PageSummaryState for x in gc.get_objects())


def count_tensors():
    return sum(type(x) is torch.Tensor for x in gc.get_objects())


def resident_bytes():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024
