"""select_every in models: a run does not depend on what the cache was used for before."""

import copy

import pytest
import torch
from tiny_models import random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill, rewind, step_inputs

LENGTH, MAX_SEQ_LEN, STEPS = 150, 256, 9
SETTINGS = {"budget": 64, "num_dense_layers": 0, "inner": "eager", "select_every": 4}
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def step(model):
    torch._dynamo.reset()
    return torch.compile(model, backend=quest_compile.backend(**SETTINGS))


def decode(step, cache, position, tokens):
    """Logits of steps that are given ``tokens`` [B, n]."""
    outs = []
    for i in range(tokens.shape[1]):
        inputs = step_inputs(cache, tokens[:, i : i + 1], position + i)
        outs.append(step(**inputs).logits[:, -1])
    return torch.stack(outs)


def assert_fresh_run(step, cache, position, tokens):
    """A copy of the cache has no state: what it gives is a fresh run."""
    twin = copy.deepcopy(cache)
    found = decode(step, cache, position, tokens)
    assert torch.equal(found, decode(step, twin, position, tokens))


def calls():
    counted = ops.counters()
    return counted["sparse_calls"], counted["sparse_calls_unscored"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_after_others_is_a_fresh_run(model, step, mode, batch):
    prompt, other, tokens = (random_prompt(batch, n, seed=n) for n in (LENGTH, LENGTH + 1, STEPS))
    with mode():
        cache = prefill(model, prompt, MAX_SEQ_LEN)
        ops.reset_counters()
        decode(step, cache, LENGTH, tokens)
        # Lengths 151 to 159: scored at 151, 152 and 156.
        assert calls() == (STEPS * NUM_LAYERS, 6 * NUM_LAYERS)
        for back in (LENGTH, LENGTH + 3):
            rewind(cache, back)
            assert_fresh_run(step, cache, back, tokens)
        decode(step, cache, LENGTH + 3 + STEPS, tokens[:, :2])
        # Another text, of a length at which the next step would go on.
        cache.reset()
        model(**step_inputs(cache, torch.cat([other, tokens, tokens[:, :4]], 1), 0))
        assert_fresh_run(step, cache, LENGTH + 5 + STEPS, tokens)


def test_a_compiled_prefill_ends_a_run(model, step):
    """It summarises pages itself, so that no foreign write is found."""
    prompt, tokens = random_prompt(1, LENGTH), random_prompt(1, STEPS, seed=1)
    with torch.no_grad():
        cache = prefill(model, prompt, MAX_SEQ_LEN)
        decode(step, cache, LENGTH, tokens[:, :3])
        cache.reset()
        other = random_prompt(1, LENGTH + 3, seed=2)
        step(**step_inputs(cache, other, 0))
        ops.reset_counters()
        twin = copy.deepcopy(cache)
        found = decode(step, cache, LENGTH + 3, tokens[:, :1])
        assert calls() == (NUM_LAYERS, 0)
        assert torch.equal(found, decode(step, twin, LENGTH + 3, tokens[:, :1]))


def test_another_backend_on_the_same_cache_ends_a_run(model, step):
    prompt, tokens = random_prompt(1, LENGTH), random_prompt(1, STEPS, seed=1)
    single = torch.compile(model, backend=quest_compile.backend(**SETTINGS | {"select_every": 1}))
    with torch.no_grad():
        cache = prefill(model, prompt, MAX_SEQ_LEN)
        decode(step, cache, LENGTH, tokens[:, :2])
        decode(single, cache, LENGTH + 2, tokens[:, 2:3])
        ops.reset_counters()
        decode(step, cache, LENGTH + 3, tokens[:, 3:4])
        assert calls() == (NUM_LAYERS, 0)


def test_changed_keys_are_scored_anew(model, step):
    prompt, tokens = random_prompt(1, LENGTH), random_prompt(1, STEPS, seed=1)
    with torch.no_grad():
        cache = prefill(model, prompt, MAX_SEQ_LEN)
        decode(step, cache, LENGTH, tokens[:, :3])
        cache.layers[1].keys.mul_(-1)
        ops.reset_counters()
        decode(step, cache, LENGTH + 3, tokens[:, 3:4])
        # Layer 0 goes on.
        assert calls() == (NUM_LAYERS, 1)


def test_one_is_the_operator_without(model):
    backend = quest_compile.backend(**SETTINGS | {"select_every": 1})
    with torch.no_grad():
        cache = prefill(model, random_prompt(1, LENGTH), MAX_SEQ_LEN)
        call = torch.compile(model, backend=backend)
        greedy_step(call, cache, torch.zeros(1, 1, dtype=torch.int64), LENGTH)
    assert {row.attention for row in backend.report().graphs[-1].rows} == {"quest::sparse_decode"}


def test_audits_compare_what_was_selected(model):
    """The audit of a selection by earlier scores is that of its pages, not of better ones."""
    found = []
    for every in (1, 100):
        torch._dynamo.reset()
        backend = quest_compile.backend(**SETTINGS | {"select_every": every, "audit": 1})
        backend.reset()
        call = torch.compile(model, backend=backend)
        with torch.no_grad():
            cache = prefill(model, random_prompt(1, LENGTH), MAX_SEQ_LEN)
            decode(call, cache, LENGTH, random_prompt(1, STEPS, seed=1))
        (graph,) = backend.report().graphs
        found.append([audit for _, audit in graph.audited_rows()])
    assert all(audit.audited_calls == STEPS for audits in found for audit in audits)
    for anew, reused in zip(*found):
        assert anew.kept_mass != reused.kept_mass
