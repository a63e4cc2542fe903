"""Several caches, models and backends in one process do not get into each other's way."""

import pytest
import torch
from cache_runs import (
    LENGTH,
    MAX_SEQ_LEN,
    NUM_LAYERS,
    PAGE_FORMAT,
    STEPS,
    assert_sparse_calls_since_reset,
    decode,
    fresh_run,
    grad_modes,
    is_exact,
)
from tiny_models import FEW_PAGES, SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill, rewind

OTHERS = {
    "larger budget": {"budget": 96, "page_size": 16},
    "smaller pages": {"budget": 64, "page_size": 8},
    "covering budget": {"budget": 240, "page_size": 16},
    "another summary": {"budget": 64, "preset": "paper"},
}


def other_backend(settings):
    settings = FEW_PAGES | {"num_dense_layers": 0, "inner": "aot_eager"} | settings
    return quest_compile.backend(**settings)


def other_step(model, settings):
    return torch.compile(model, backend=other_backend(settings))


@grad_modes
def test_two_generations_in_turn(model, step, mode):
    prompts = [random_prompt(1, LENGTH, seed=s) for s in (1, 2)]
    expected = [fresh_run(model, step, p) for p in prompts]
    with mode():
        caches = [prefill(model, p[:, :-1], MAX_SEQ_LEN) for p in prompts]
        tokens = [p[:, -1:] for p in prompts]
        found = [[], []]
        ops.reset_counters()
        for i in range(STEPS):
            for j in (0, 1):
                tokens[j] = greedy_step(step, caches[j], tokens[j], LENGTH - 1 + i)
                found[j].append(int(tokens[j]))
    assert found == expected
    assert_sparse_calls_since_reset(2 * STEPS)
    assert is_exact(caches)


@pytest.mark.parametrize("other", OTHERS)
def test_two_backends_on_caches_of_their_own(model, step, other):
    steps = [step, other_step(model, OTHERS[other])]
    prompt = random_prompt(1, LENGTH)
    expected = [fresh_run(model, each, prompt) for each in steps]
    assert expected[0] != expected[1]
    with torch.no_grad():
        caches = [prefill(model, prompt[:, :-1], MAX_SEQ_LEN) for _ in steps]
        tokens, found = [prompt[:, -1:]] * 2, [[], []]
        for i in range(STEPS):
            for j in (0, 1):
                tokens[j] = greedy_step(steps[j], caches[j], tokens[j], LENGTH - 1 + i)
                found[j].append(int(tokens[j]))
    assert found == expected


@grad_modes
@pytest.mark.parametrize("other", OTHERS)
def test_two_backends_on_the_same_cache(model, step, mode, other):
    """The other backend writes keys behind the back of this one, and rewinds."""
    theirs = other_step(model, OTHERS[other])
    formats = (PAGE_FORMAT, other_backend(OTHERS[other]).config.page_format)
    prompt = random_prompt(1, LENGTH)
    expected = [fresh_run(model, each, prompt) for each in (step, theirs)]
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        for each in (0, 1, 0, 1):
            rewind(cache, LENGTH - 1)
            ops.reset_counters()
            found = decode((step, theirs)[each], cache, prompt[:, -1:], LENGTH - 1)
            assert found == expected[each]
            is_covered = each == 1 and other == "covering budget"
            counter = "sparse_calls_covered" if is_covered else "sparse_calls"
            assert ops.counters()[counter] == STEPS * NUM_LAYERS
            assert is_exact([cache], formats[each])


def test_two_models_with_one_backend(model, step):
    second = tiny_model("qwen2", num_hidden_layers=NUM_LAYERS)
    second_step = other_step(second, {"budget": 64})
    models, steps, prompt = (model, second), (step, second_step), random_prompt(1, LENGTH)
    expected = [fresh_run(m, s, prompt) for m, s in zip(models, steps)]
    assert expected[0] != expected[1]
    with torch.no_grad():
        caches = [prefill(m, prompt[:, :-1], MAX_SEQ_LEN) for m in models]
        tokens, found = [prompt[:, -1:]] * 2, [[], []]
        ops.reset_counters()
        for i in range(STEPS):
            for j in (0, 1):
                tokens[j] = greedy_step(steps[j], caches[j], tokens[j], LENGTH - 1 + i)
                found[j].append(int(tokens[j]))
    assert found == expected
    assert_sparse_calls_since_reset(2 * STEPS)
    assert is_exact(caches)


def test_caches_of_growing_length_share_a_dynamic_graph(model):
    torch._dynamo.reset()
    backend = quest_compile.backend(**SHORT, budget=80, inner="aot_eager")
    step = torch.compile(model, backend=backend)
    prompt = random_prompt(1, LENGTH)
    runs = []
    with torch.no_grad():
        for max_seq_len in (200, 233, 301, 512):
            cache = prefill(model, prompt[:, :-1], max_seq_len)
            runs.append(decode(step, cache, prompt[:, -1:], LENGTH - 1))
    assert runs == [runs[0]] * 4
    assert len(backend.report().graphs) == 2


def test_models_of_other_sizes_that_share_their_code_are_sparse_too():
    """A draft model beside its target: torch takes sizes that differ for symbols, head_dim too."""
    torch._dynamo.reset()
    ops.reset_counters()
    backend = other_backend({"budget": 80})
    for head_dim, num_kv_heads in ((16, 2), (24, 4), (40, 1)):
        sizes = {"head_dim": head_dim, "num_key_value_heads": num_kv_heads}
        other = tiny_model("llama", num_hidden_layers=2, **sizes)
        with torch.no_grad():
            cache = prefill(other, random_prompt(1, LENGTH)[:, :-1], MAX_SEQ_LEN)
            decode(torch.compile(other, backend=backend), cache, random_prompt(1, 1), LENGTH - 1, 3)
        assert is_exact([cache])
    assert backend.report().count("untouched") == 0
    assert ops.counters()["sparse_calls"] == 3 * 3 * 2
