"""A decode step on a GPU is one CUDA graph; skipped where there is no GPU."""

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model
from torch._dynamo.utils import counters

import quest_compile
from quest_compile.bench.gpu_check.end_to_end import num_recorded
from quest_compile.decoding import greedy_step, prefill, rewind, step_inputs

pytestmark = pytest.mark.cuda

LENGTH, MAX_SEQ_LEN, WARM_UP, STEPS = 300, 1024, 4, 24
modes = pytest.mark.parametrize("mode", [None, "reduce-overhead"])


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    counters.clear()


def compiled(model, mode=None, **settings):
    backend = quest_compile.backend(**{**SHORT, "budget": 64, **settings})
    return torch.compile(model, backend=backend, mode=mode), backend


def decode(step, model, cache, token, position, steps):
    tokens = []
    with torch.no_grad():
        for i in range(steps):
            token = greedy_step(step, cache, token.clone(), position + i)
            tokens.append(int(token))
    return tokens


def eager_tokens(model, prompt, steps):
    """The rewritten graph without CUDA graphs."""
    step, _ = compiled(model, inner="eager")
    cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    return decode(step, model, cache, prompt[:, -1:], prompt.shape[1] - 1, steps)


@modes
def test_one_graph_is_recorded_and_nothing_is_skipped(mode):
    model, prompt = tiny_model("llama").cuda(), random_prompt(1, LENGTH).cuda()
    expected = eager_tokens(model, prompt, STEPS)
    torch._dynamo.reset()
    counters.clear()
    step, backend = compiled(model, mode)
    cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    tokens = decode(step, model, cache, prompt[:, -1:], LENGTH - 1, WARM_UP)
    assert num_recorded("cuda") == 1
    last = torch.tensor([[tokens[-1]]], device="cuda")
    tokens += decode(step, model, cache, last, LENGTH - 1 + WARM_UP, STEPS - WARM_UP)
    assert num_recorded("cuda") == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    # Only the token is copied into the graph's memory; caches and summaries are used in place.
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] == 1
    assert tokens == expected
    (graph,) = backend.report().graphs
    assert graph.is_cuda_graph and graph.count("sparse") == 2
    attention = [row.attention for row in graph.rows]
    assert attention[2:] == ["quest::sparse_decode_step"] * 2


@modes
def test_no_cache_is_copied(mode):
    """Memory grows by less than one cache tensor: 64 MiB each here."""
    model, length, capacity = tiny_model("llama").cuda(), 100, 2**19
    prompt = random_prompt(1, length).cuda()
    step, _ = compiled(model, mode)
    cache = prefill(model, prompt[:, :-1], capacity)
    size = cache.layers[0].keys.nbytes
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    with torch.no_grad():
        step(**step_inputs(cache, prompt[:, -1:], length - 1))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    decode(step, model, cache, prompt[:, -1:], length, 8)
    assert size >= 2**26
    assert torch.cuda.max_memory_reserved() - before < size
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


def test_results_of_the_default_mode_may_be_kept():
    model, prompt = tiny_model("llama").cuda(), random_prompt(1, LENGTH).cuda()
    kept = {}
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        step, _ = compiled(model, inner=inner)
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        with torch.no_grad():
            kept[inner] = [
                step(**step_inputs(cache, prompt[:, i : i + 1], LENGTH - 1 + i)).logits
                for i in range(8)
            ]
    for ours, expected in zip(kept["inductor"], kept["eager"]):
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)


@modes
def test_refilled_cache_is_noticed_inside_the_recorded_graph(mode):
    model = tiny_model("llama").cuda()
    prompts = [random_prompt(1, LENGTH, seed=seed).cuda() for seed in (0, 1)]
    expected = [eager_tokens(model, prompt, 12) for prompt in prompts]
    torch._dynamo.reset()
    step, _ = compiled(model, mode)
    cache = prefill(model, prompts[0][:, :-1], MAX_SEQ_LEN)
    found = [decode(step, model, cache, prompts[0][:, -1:], LENGTH - 1, 12)]
    num_graphs = num_recorded("cuda")
    rewind(cache, 0)
    with torch.no_grad():
        model(**step_inputs(cache, prompts[1][:, :-1], 0))
    found.append(decode(step, model, cache, prompts[1][:, -1:], LENGTH - 1, 12))
    assert found == expected
    assert num_recorded("cuda") == num_graphs


@modes
def test_growing_past_the_budget_needs_no_other_graph(mode):
    model, prompt = tiny_model("llama").cuda(), random_prompt(1, 40).cuda()
    expected = eager_tokens(model, prompt, 60)
    torch._dynamo.reset()
    step, _ = compiled(model, mode)
    cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    assert decode(step, model, cache, prompt[:, -1:], 39, 60) == expected
    assert num_recorded("cuda") == 1
