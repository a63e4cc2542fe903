"""Several Python threads decode with one compiled model, each with caches of its own."""

import threading

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

from quest_compile import ops
from quest_compile.decoding import prefill

NUM_ROUNDS = 3


def run_in_threads(functions):
    """The results; an exception of a thread is raised here."""
    results, errors = [None] * len(functions), []
    start = threading.Barrier(len(functions))

    def run(i):
        try:
            start.wait(60)
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


@grad_modes
@pytest.mark.parametrize("num_threads", [2, 5])
def test_caches_of_threads_do_not_mix(model, step, mode, num_threads):
    prompts = [random_prompt(1, LENGTH, seed=seed) for seed in range(num_threads)]
    expected = [fresh_run(model, step, prompt) for prompt in prompts]
    caches = []
    with mode():  # compiled once in this thread
        warm = prefill(model, prompts[0][:, :-1], MAX_SEQ_LEN)
        decode(step, warm, prompts[0][:, -1:], LENGTH - 1, steps=1)

    def generate(prompt):
        found = []
        with mode():  # grad modes belong to a thread
            for _ in range(NUM_ROUNDS):
                cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
                found.append(decode(step, cache, prompt[:, -1:], LENGTH - 1))
                caches.append(cache)
        return found

    ops.reset_counters()
    found = run_in_threads([lambda p=prompt: generate(p) for prompt in prompts])
    assert found == [[tokens] * NUM_ROUNDS for tokens in expected]
    assert_sparse_calls_since_reset(num_threads * NUM_ROUNDS * STEPS)
    assert is_exact(caches)


def test_a_cache_may_move_from_thread_to_thread(model, step):
    prompt = random_prompt(1, LENGTH)
    expected = fresh_run(model, step, prompt)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    found = []
    for i in range(STEPS):
        token = torch.tensor([[found[-1]]]) if found else prompt[:, -1:]

        def one_step(token=token, position=LENGTH - 1 + i):
            with torch.no_grad():
                return decode(step, cache, token, position, steps=1)

        found += run_in_threads([one_step])[0]
    assert found == expected
    assert is_exact([cache])
