"""A cache that is filled again, in parts or in turns, gives the tokens of a fresh run."""

import copy

import pytest
import torch
from cache_runs import (
    LENGTH,
    MAX_SEQ_LEN,
    NUM_LAYERS,
    STEPS,
    assert_sparse_calls_since_reset,
    decode,
    fresh_run,
    grad_modes,
    is_exact,
    refill,
)
from tiny_models import random_prompt
from transformers import StaticCache

from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill

PARTS = (33, 16, 61, 39)


@grad_modes
def test_reset_and_refilled_with_other_tokens_of_the_same_length(model, step, mode):
    first, second = random_prompt(1, LENGTH, seed=1), random_prompt(1, LENGTH + STEPS, seed=2)
    expected = fresh_run(model, step, second)
    with mode():
        cache = prefill(model, first[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, first[:, -1:], LENGTH - 1)
        refill(model, cache, second)
        assert decode(step, cache, second[:, -1:], LENGTH + STEPS - 1) == expected


@grad_modes
def test_reset_and_refilled_with_a_prompt_that_differs_in_the_middle(model, step, mode):
    """First and last pages are as before: only the position or the version tells."""
    first = random_prompt(1, LENGTH, seed=1)
    second = first.clone()
    second[:, 64:80] = random_prompt(1, 16, seed=7)
    expected = fresh_run(model, step, second)
    with mode():
        cache = prefill(model, first[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, first[:, -1:], LENGTH - 1, steps=2)
        refill(model, cache, second)
        assert decode(step, cache, second[:, -1:], LENGTH - 1) == expected
        assert is_exact([cache])


@grad_modes
def test_reset_and_used_again_many_times(model, step, mode):
    with mode():
        cache = prefill(model, random_prompt(1, 20), MAX_SEQ_LEN)
        for seed, length in enumerate((LENGTH, 190, 75, 190, LENGTH)):
            prompt = random_prompt(1, length, seed=seed)
            refill(model, cache, prompt)
            ops.reset_counters()
            found = decode(step, cache, prompt[:, -1:], length - 1)
            assert_sparse_calls_since_reset(STEPS)
            assert is_exact([cache])
            assert found == fresh_run(model, step, prompt)


@grad_modes
def test_refilled_by_a_compiled_prefill(model, step, mode):
    first, second = random_prompt(1, LENGTH, seed=1), random_prompt(1, LENGTH + STEPS, seed=2)
    expected = fresh_run(model, step, second)
    with mode():
        cache = prefill(model, first[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, first[:, -1:], LENGTH - 1)
        refill(model, cache, second, call=step)
        ops.reset_counters()
        assert decode(step, cache, second[:, -1:], LENGTH + STEPS - 1) == expected
    # Only the pages filled while decoding: the prefill graph sealed all the others.
    num_pages = (LENGTH - 1 + 2 * STEPS) // 16 - (LENGTH - 1 + STEPS) // 16
    assert ops.counters()["pages_sealed"] == num_pages * NUM_LAYERS * 2


@grad_modes
@pytest.mark.parametrize("calls", ["eager", "compiled", "in turn"])
def test_a_prompt_in_parts(model, step, mode, calls):
    """Parts that end inside a page and on its border; the first one creates the cache."""
    prompt = random_prompt(1, sum(PARTS) + 1)
    expected = fresh_run(model, step, prompt)
    with mode():
        cache = StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
        position = 0
        for i, part in enumerate(prompt[:, :-1].split(PARTS, dim=1)):
            is_compiled = calls == "compiled" or (calls == "in turn" and i % 2 == 1)
            greedy_step(step if is_compiled else model, cache, part, position)
            position += part.shape[1]
        ops.reset_counters()
        assert decode(step, cache, prompt[:, -1:], position) == expected
    assert_sparse_calls_since_reset(STEPS)
    assert is_exact([cache])


@grad_modes
@pytest.mark.parametrize("calls", ["eager", "compiled"])
def test_three_turns_of_a_conversation(model, step, mode, calls):
    """Between the turns a copy without summaries takes over: it must go on like the cache."""
    prompt = random_prompt(1, LENGTH)
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1)
        position = LENGTH - 1 + STEPS
        for seed, length in ((3, 24), (4, 17)):
            turn = random_prompt(1, length, seed=seed)
            greedy_step(step if calls == "compiled" else model, cache, turn[:, :-1], position)
            position += length - 1
            fresh = copy.deepcopy(cache)
            ops.reset_counters()
            found = decode(step, cache, turn[:, -1:], position, steps=10)
            assert_sparse_calls_since_reset(10)
            assert is_exact([cache])
            assert found == decode(step, fresh, turn[:, -1:], position, steps=10)
            position += 10
            for layer, expected in zip(cache.layers, fresh.layers):
                assert torch.equal(layer.keys, expected.keys)
