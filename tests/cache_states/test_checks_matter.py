"""Each check that keeps page summaries exact is needed: without it a case goes stale."""

import pytest
import torch
from cache_runs import (
    LENGTH,
    MAX_SEQ_LEN,
    NUM_LAYERS,
    STEPS,
    decode,
    grad_modes,
    is_exact,
    refill,
)
from sabotage import without_checks
from tiny_models import random_prompt

from quest_compile.decoding import prefill, rewind


def rewound(model, step):
    """Decoded, rewound, and decoded differently: pages that were sealed are sealed again."""
    prompt = random_prompt(1, LENGTH)
    cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    decode(step, cache, prompt[:, -1:], LENGTH - 1)
    rewind(cache, LENGTH - 1)
    decode(step, cache, random_prompt(1, 1, seed=5), LENGTH - 1)
    return [cache]


def refilled(model, step, call=None):
    """Reset and filled with another prompt, up to the very length it had."""
    first, second = random_prompt(1, LENGTH, seed=1), random_prompt(1, LENGTH + STEPS, seed=2)
    cache = prefill(model, first[:, :-1], MAX_SEQ_LEN)
    decode(step, cache, first[:, -1:], LENGTH - 1)
    refill(model, cache, second, call)
    decode(step, cache, second[:, -1:], LENGTH + STEPS - 1, steps=1)
    return [cache]


def refilled_by_a_compiled_prefill(model, step):
    return refilled(model, step, call=step)


def two_in_turn(model, step):
    prompts = [random_prompt(1, LENGTH, seed=s) for s in (1, 2)]
    caches = [prefill(model, p[:, :-1], MAX_SEQ_LEN) for p in prompts]
    for i in range(STEPS):
        for cache, prompt in zip(caches, prompts):
            decode(step, cache, prompt[:, -1:], LENGTH - 1 + i, steps=1)
    return caches


CASES = {f.__name__: f for f in (rewound, refilled, refilled_by_a_compiled_prefill, two_in_turn)}


@grad_modes
@pytest.mark.parametrize("case", CASES)
def test_all_checks_together_keep_every_summary_exact(model, step, mode, case):
    with mode():
        assert is_exact(CASES[case](model, step))


@pytest.mark.parametrize("check", ["version", "sampled pages"])
@pytest.mark.parametrize("case", ["refilled", "refilled_by_a_compiled_prefill"])
def test_either_check_alone_notices_a_refill(model, step, case, check):
    with torch.no_grad(), without_checks(check, num_layers=NUM_LAYERS):
        assert is_exact(CASES[case](model, step))


@pytest.mark.parametrize(
    ("case", "mode", "checks"),
    [
        ("refilled", torch.no_grad, ["version", "sampled pages"]),
        ("refilled", torch.inference_mode, ["sampled pages"]),
        ("refilled_by_a_compiled_prefill", torch.no_grad, ["version", "position"]),
        ("refilled_by_a_compiled_prefill", torch.inference_mode, ["position"]),
        ("rewound", torch.no_grad, ["version", "position"]),
        ("rewound", torch.inference_mode, ["position"]),
        ("two_in_turn", torch.no_grad, ["state per cache"]),
        ("two_in_turn", torch.inference_mode, ["state per cache"]),
    ],
)
def test_without_its_checks_a_summary_goes_stale(model, step, case, mode, checks):
    """The tests above can fail: each case does when what protects it is taken out."""
    with mode(), without_checks(*checks, num_layers=NUM_LAYERS):
        assert not is_exact(CASES[case](model, step))
