"""Keys that other code moved or edited are noticed before the next step attends them."""

import copy

import torch
from cache_runs import (
    LENGTH,
    MAX_SEQ_LEN,
    STEPS,
    assert_sparse_calls_since_reset,
    decode,
    decode_row,
    fresh_run,
    grad_modes,
    is_exact,
)
from tiny_models import random_prompt

from quest_compile import ops
from quest_compile.decoding import prefill, rewind


def test_keys_overwritten_in_the_middle_are_noticed(model, step):
    """The version counter sees it; the sampled check alone might take a few steps."""
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=2)
        for layer in cache.layers:
            layer.keys[:, :, 32:48] *= -3.0
        rewind(cache, LENGTH - 1)
        expected = decode(step, copy.deepcopy(cache), prompt[:, -1:], LENGTH - 1)
        assert decode(step, cache, prompt[:, -1:], LENGTH - 1) == expected
    assert is_exact([cache])


def test_storage_swapped_under_a_cache_is_noticed(model, step):
    first, second = random_prompt(1, LENGTH, seed=1), random_prompt(1, LENGTH, seed=2)
    expected = fresh_run(model, step, second)
    with torch.no_grad():
        cache = prefill(model, first[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, first[:, -1:], LENGTH - 1)
        other = prefill(model, second[:, :-1], MAX_SEQ_LEN)
        for mine, theirs in zip(cache.layers, other.layers):
            mine.keys.data, mine.values.data = theirs.keys.data, theirs.values.data
        rewind(cache, LENGTH - 1)
        assert decode(step, cache, second[:, -1:], LENGTH - 1) == expected


@grad_modes
def test_a_reordered_batch(model, step, mode):
    prompts = random_prompt(2, LENGTH)
    with mode():
        cache = prefill(model, prompts[:, :-1], MAX_SEQ_LEN)
        rows = [decode_row(step, cache, prompts[:, -1:], row) for row in (0, 1)]
        rewind(cache, LENGTH - 1)
        order = torch.tensor([1, 0])
        for layer in cache.layers:
            layer.keys.copy_(layer.keys.index_select(0, order))
            layer.values.copy_(layer.values.index_select(0, order))
        swapped = [decode_row(step, cache, prompts[order, -1:], row) for row in (0, 1)]
    assert rows[0] != rows[1]
    assert swapped == rows[::-1]
    assert is_exact([cache])


@grad_modes
def test_beams_reordered_before_every_step(model, step, mode):
    """``reorder_cache`` puts new tensors into the cache; a beam may take over several others."""
    prompts = random_prompt(2, LENGTH)
    orders = torch.randint(0, 2, (STEPS, 2), generator=torch.Generator().manual_seed(0))
    orders[:8] = torch.tensor([1, 0])
    with mode():
        cache = prefill(model, prompts[:, :-1], MAX_SEQ_LEN)
        rows = prompts[:, -1:]
        for i, order in enumerate(orders):
            cache.reorder_cache(order)
            twin, rows = copy.deepcopy(cache), rows[order]
            ops.reset_counters()
            found = decode(step, cache, rows, LENGTH - 1 + i, steps=1)
            assert_sparse_calls_since_reset(1)
            assert is_exact([cache])
            assert found == decode(step, twin, rows, LENGTH - 1 + i, steps=1)
            rows = torch.tensor(found).view(2, 1)


def test_a_write_past_torch_is_seen_once_its_writer_says_so(model, step):
    """Through numpy no version counts: one token in a page that this step does not compare."""
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=2)
        for layer in cache.layers:
            layer.keys.numpy()[:, :, 37] *= -3.0
            torch.autograd.graph.increment_version(layer.keys)
        decode(step, cache, prompt[:, -1:], LENGTH + 1, steps=1)
    assert is_exact([cache])
