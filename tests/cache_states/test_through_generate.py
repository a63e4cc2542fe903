"""generate() of transformers makes, enlarges and reorders caches itself."""

import pytest
import torch
from cache_runs import (
    LENGTH,
    MAX_SEQ_LEN,
    NUM_LAYERS,
    SETTINGS,
    STEPS,
    assert_sparse_calls_since_reset,
    decode,
    grad_modes,
)
from tiny_models import random_prompt, tiny_model
from transformers import StaticCache

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step


@pytest.fixture
def generating_model():
    """A model of its own: generate() remembers the largest cache it made."""
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    return quest_compile.compile_for_generate(model, **SETTINGS)


def generate(model, prompt, num_tokens=STEPS + 1, **settings):
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        **settings,
    )
    return out[:, prompt.shape[1] :].tolist()


def fresh_generation(model, step, prompt):
    """The whole prompt prefilled eagerly into a new cache, then our own loop."""
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
        first = greedy_step(model, cache, prompt, 0)
        return [[int(first), *decode(step, cache, first, prompt.shape[1])]]


@grad_modes
def test_longer_and_shorter_calls(model, step, generating_model, mode):
    """The cache grows with the longest call so far: one static graph, then a dynamic one."""
    backend = quest_compile.backend(**SETTINGS)
    prompts = [random_prompt(1, n, seed=n) for n in (100, 190, 140, 220, 100)]
    expected = [fresh_generation(model, step, prompt) for prompt in prompts]
    num_graphs = len(backend.report().graphs)
    ops.reset_counters()
    with mode():
        assert [generate(generating_model, prompt) for prompt in prompts] == expected
    assert_sparse_calls_since_reset(len(prompts) * STEPS)
    assert len(backend.report().graphs) == num_graphs + 2


def test_the_same_call_twice_compiles_once(model, step, generating_model):
    backend = quest_compile.backend(**SETTINGS)
    prompt = random_prompt(1, LENGTH)
    expected = fresh_generation(model, step, prompt)
    num_graphs = len(backend.report().graphs)
    with torch.no_grad():
        assert [generate(generating_model, prompt) for _ in range(3)] == [expected] * 3
    assert len(backend.report().graphs) == num_graphs + 1


def test_beam_search_stays_dense_and_the_report_says_nothing_was_compiled(model):
    """transformers does not compile the steps of a beam search, whatever backend it is given."""
    torch._dynamo.reset()
    beams = {"num_beams": 3, "num_return_sequences": 3}
    prompt = random_prompt(1, LENGTH)
    expected = generate(tiny_model("llama", num_hidden_layers=NUM_LAYERS), prompt, **beams)
    searching = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    settings = SETTINGS | {"budget": 112}
    quest_compile.compile_for_generate(searching, **settings)
    assert generate(searching, prompt, **beams) == expected
    assert ops.counters()["sparse_calls"] == 0
    report = quest_compile.backend(**settings).report()
    assert not report.graphs
    assert "no graph was compiled" in str(report)


def test_beam_search_with_a_compiled_model_reorders_its_caches(model):
    """``model.compile`` does reach beam search: every step finds reordered caches."""
    torch._dynamo.reset()
    prompt = random_prompt(1, LENGTH)
    beams = {"num_beams": 3, "num_return_sequences": 3, "cache_implementation": "static"}
    expected = generate(tiny_model("llama", num_hidden_layers=NUM_LAYERS), prompt, **beams)
    searching = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    settings = SETTINGS | {"budget": 176}
    assert settings["budget"] > LENGTH + STEPS + 1
    backend = quest_compile.backend(**settings)
    searching.forward = torch.compile(searching.forward, backend=backend)
    found = generate(searching, prompt, max_cache_len=MAX_SEQ_LEN, **beams)
    assert found == expected
    assert ops.counters()["sparse_calls_covered"] == STEPS * NUM_LAYERS
    assert backend.report().count("sparse") >= NUM_LAYERS
