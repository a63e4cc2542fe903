"""A cache that a compiled prefill creates: no input of that graph, but one of its outputs."""

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
from functorch.compile import make_boxed_func
from tiny_models import FEW_PAGES, random_prompt
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from transformers import StaticCache

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step
from quest_compile.passes import decide


def new_cache(model, step, prompt):
    """A cache that ``step`` creates and fills with all tokens but the last."""
    cache = StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
    greedy_step(step, cache, prompt[:, :-1], 0)
    return cache


@grad_modes
def test_decoding_gives_the_tokens_of_an_eager_prefill(model, step, mode):
    prompt = random_prompt(1, LENGTH)
    expected = fresh_run(model, step, prompt)
    with mode():
        cache = new_cache(model, step, prompt)
        ops.reset_counters()
        assert decode(step, cache, prompt[:, -1:], LENGTH - 1) == expected
    assert_sparse_calls_since_reset(STEPS)
    assert is_exact([cache])


@grad_modes
def test_a_new_cache_for_every_request(model, step, mode):
    """Other addresses in every request, while the first cache is still in use."""
    prompts = [random_prompt(1, LENGTH, seed=seed) for seed in range(4)]
    expected = [fresh_run(model, step, prompt) for prompt in prompts]
    with mode():
        first = new_cache(model, step, prompts[0])
        found = decode(step, first, prompts[0][:, -1:], LENGTH - 1, steps=4)
        for prompt, tokens in zip(prompts[1:], expected[1:]):
            cache = new_cache(model, step, prompt)
            assert cache.layers[0].keys.data_ptr() != first.layers[0].keys.data_ptr()
            assert decode(step, cache, prompt[:, -1:], LENGTH - 1) == tokens
            assert is_exact([cache])
            token, position = torch.tensor([[found[-1]]]), LENGTH - 1 + len(found)
            found += decode(step, first, token, position, steps=4)
    assert found == expected[0][: len(found)]
    assert is_exact([first])


@pytest.fixture
def static_inputs(monkeypatch):
    """For each graph AOT Autograd sees: (shapes of static inputs, shapes of the others)."""
    graphs = []

    def compiler(gm, example_inputs):
        static = TracingContext.get().fw_metadata.static_input_indices
        shapes = [[], []]
        for i, value in enumerate(example_inputs):
            shapes[i not in static].append(tuple(value.shape))
        graphs.append(shapes)
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(
        "torch._dynamo.backends.debugging.aot_eager", aot_autograd(fw_compiler=compiler)
    )
    return graphs


@pytest.mark.parametrize("step_devices", [(), ("cpu",)], ids=["two_operators", "one_operator"])
@grad_modes
def test_all_inputs_but_the_token_have_a_fixed_address(
    model, mode, step_devices, static_inputs, monkeypatch
):
    """What CUDA graphs need: Inductor skips them for a graph that writes any other input."""
    torch._dynamo.reset()
    monkeypatch.setattr(decide, "_STEP_DEVICES", frozenset(step_devices))
    backend = quest_compile.backend(**FEW_PAGES, budget=64, num_dense_layers=1, inner="aot_eager")
    step = torch.compile(model, backend=backend)
    prompt = random_prompt(1, LENGTH)
    with mode():
        cache = new_cache(model, step, prompt)
        assert not hasattr(cache.layers[0].keys, "_dynamo_static_input_type")
        decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=1)
    static, others = static_inputs[-1]
    assert others == [(1, 1)]
    assert static.count(tuple(cache.layers[0].keys.shape)) == 2 * len(cache.layers)
    assert backend.report().count("sparse") == 1
