"""A cache that continues at an earlier position gives the tokens of a fresh run."""

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
)
from tiny_models import random_prompt

from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill, rewind

MOST_TOKENS = 40


@grad_modes
def test_rewound_cache(model, step, mode):
    prompt = random_prompt(1, LENGTH)
    expected = fresh_run(model, step, prompt)
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1)
        decode(step, cache, random_prompt(1, 1, seed=5), LENGTH - 1 + STEPS)
        rewind(cache, LENGTH - 1)
        ops.reset_counters()
        assert decode(step, cache, prompt[:, -1:], LENGTH - 1) == expected
    assert_sparse_calls_since_reset(STEPS)


@grad_modes
def test_rewinding_costs_no_rebuild(model, step, mode):
    prompt = random_prompt(1, LENGTH)
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1)
        rewind(cache, LENGTH - 1)
        ops.reset_counters()
        decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=1)
    assert ops.counters()["summaries_rebuilt"] == 0
    # Writes to a cache made in inference mode are not counted: there a step back rebuilds.
    num_pages = 1 if mode is torch.no_grad else LENGTH // 16
    assert ops.counters()["pages_sealed"] <= NUM_LAYERS * 2 * num_pages


@grad_modes
def test_rolled_back_by_one_to_forty_tokens(model, step, mode):
    """As a rejected draft is: take tokens back, decode others, take those back, decode again."""
    prompt = random_prompt(1, LENGTH)
    expected = fresh_run(model, step, prompt, steps=MOST_TOKENS)
    fed = [int(prompt[0, -1]), *expected[:-1]]
    end = LENGTH - 1 + MOST_TOKENS
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        assert decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=MOST_TOKENS) == expected
        ops.reset_counters()
        for num_tokens in range(1, MOST_TOKENS + 1):
            twin, draft = copy.deepcopy(cache), random_prompt(1, 1, seed=num_tokens)
            for each in (cache, twin):
                rewind(each, end - num_tokens)
            found = decode(step, cache, draft, end - num_tokens, steps=3)
            assert is_exact([cache])
            assert found == decode(step, twin, draft, end - num_tokens, steps=3)
            rewind(cache, end - num_tokens)
            first = torch.tensor([[fed[-num_tokens]]])
            again = decode(step, cache, first, end - num_tokens, steps=num_tokens)
            assert again == expected[-num_tokens:]
            assert is_exact([cache])
    assert_sparse_calls_since_reset(MOST_TOKENS * 6 + sum(range(MOST_TOKENS + 1)))


@grad_modes
@pytest.mark.parametrize("prefilled", ["eagerly", "compiled"])
def test_rewound_into_the_prompt_and_continued_with_another(model, step, mode, prefilled):
    prompt, other = random_prompt(1, LENGTH, seed=1), random_prompt(1, 90, seed=2)
    kept = 61
    expected = fresh_run(model, step, torch.cat([prompt[:, :kept], other], 1))
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1)
        rewind(cache, kept)
        greedy_step(step if prefilled == "compiled" else model, cache, other[:, :-1], kept)
        ops.reset_counters()
        assert decode(step, cache, other[:, -1:], kept + 89) == expected
    assert_sparse_calls_since_reset(STEPS)
    assert is_exact([cache])
