"""Whatever happened to a cache before, decoding gives the tokens of a fresh run."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from tiny_models import random_prompt, tiny_model

import quest_compile
from quest_compile import ops, state
from quest_compile.decoding import greedy_step, prefill, rewind

MAX_SEQ_LEN = 256
LENGTH = 150
STEPS = 20
SETTINGS = {"budget": 64, "num_dense_layers": 0, "inner": "aot_eager"}

grad_modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def step(model):
    return torch.compile(model, backend=quest_compile.backend(**SETTINGS))


def decode(step, cache, first_token, position, steps=STEPS):
    tokens = []
    token = first_token
    for i in range(steps):
        token = greedy_step(step, cache, token, position + i)
        tokens.append(int(token))
    return tokens


def refill(model, cache, prompt, call=None):
    """Reset the cache and put another prompt in, all but its last token."""
    cache.reset()
    greedy_step(model if call is None else call, cache, prompt[:, :-1], 0)


def fresh_run(model, step, prompt, steps=STEPS):
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        return decode(step, cache, prompt[:, -1:], prompt.shape[1] - 1, steps)


def assert_sparse_calls_since_reset(steps):
    assert ops.counters()["sparse_calls"] == steps * 4


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
    assert ops.counters()["pages_sealed"] <= 4 * 2


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
    assert ops.counters()["pages_sealed"] == num_pages * 4 * 2


@grad_modes
def test_compiled_prefill_into_a_new_cache(model, step, mode):
    prompt = random_prompt(1, LENGTH)
    expected = fresh_run(model, step, prompt)
    with mode():
        cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
        greedy_step(step, cache, prompt[:, :-1], 0)
        assert decode(step, cache, prompt[:, -1:], LENGTH - 1) == expected


@grad_modes
def test_a_second_turn_prefilled_eagerly(model, step, mode):
    prompt, second = random_prompt(1, LENGTH), random_prompt(1, 40, seed=3)
    position = LENGTH - 1 + STEPS
    with mode():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1)
        greedy_step(model, cache, second[:, :-1], position)
        fresh = copy.deepcopy(cache)
        found = decode(step, cache, second[:, -1:], position + 39)
        assert found == decode(step, fresh, second[:, -1:], position + 39)


@grad_modes
def test_two_generations_in_turn(model, step, mode):
    prompts = [random_prompt(1, LENGTH, seed=s) for s in (1, 2)]
    expected = [fresh_run(model, step, p) for p in prompts]
    with mode():
        caches = [prefill(model, p[:, :-1], MAX_SEQ_LEN) for p in prompts]
        tokens = [p[:, -1:] for p in prompts]
        found = [[], []]
        for i in range(STEPS):
            for j in (0, 1):
                tokens[j] = greedy_step(step, caches[j], tokens[j], LENGTH - 1 + i)
                found[j].append(int(tokens[j]))
    assert found == expected


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
    for layer in cache.layers:
        _assert_summary_is_exact(layer.keys, LENGTH - 1 + STEPS)


def _assert_summary_is_exact(key_cache, length):
    summary = state.state_of(key_cache, 16).page_summary
    complete = length // 16
    expected = ops.build_page_summary(key_cache, torch.tensor([length]))
    assert torch.equal(summary[:, :, :complete], expected[:, :, :complete])


def test_a_copied_cache_is_on_its_own(model, step):
    prompt = random_prompt(1, LENGTH)
    expected = fresh_run(model, step, prompt)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, random_prompt(1, 1, seed=5), LENGTH - 1)
        twin = copy.deepcopy(cache)
        assert not getattr(twin.layers[0].keys, "_quest_page_summaries", None)
        for either in (cache, twin, cache):
            rewind(either, LENGTH - 1)
            assert decode(step, either, prompt[:, -1:], LENGTH - 1) == expected


def test_page_summaries_die_with_their_cache(model, step):
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=1)
    summary = weakref.ref(state.state_of(cache.layers[3].keys, 16).page_summary)
    assert summary() is not None
    del cache
    gc.collect()
    assert summary() is None


class TestEachCheckIsNeeded:
    """With a check taken out, the tests above would fail: here it is taken out on purpose."""

    def _refilled_tokens(self, model, step, mode):
        first, second = random_prompt(1, LENGTH, seed=1), random_prompt(1, LENGTH + STEPS, seed=2)
        with mode():
            cache = prefill(model, first[:, :-1], MAX_SEQ_LEN)
            decode(step, cache, first[:, -1:], LENGTH - 1)
            refill(model, cache, second)
            decode(step, cache, second[:, -1:], LENGTH + STEPS - 1, steps=1)
        return cache

    def _is_exact(self, cache):
        try:
            for layer in cache.layers:
                states = layer.keys._quest_page_summaries
                summary = states[16].page_summary
                expected = ops.build_page_summary(layer.keys, torch.tensor([LENGTH + STEPS]))
                complete = (LENGTH + STEPS) // 16
                assert torch.equal(summary[:, :, :complete], expected[:, :, :complete])
        except AssertionError:
            return False
        return True

    @grad_modes
    def test_both_checks_on(self, model, step, mode):
        assert self._is_exact(self._refilled_tokens(model, step, mode))

    def test_device_check_suffices_without_the_version(self, model, step, monkeypatch):
        monkeypatch.setattr(state.PageSummaryState, "invalidate", lambda self: None)
        assert self._is_exact(self._refilled_tokens(model, step, torch.no_grad))

    def test_version_check_suffices_without_the_device(self, model, step, unchecked_update):
        assert self._is_exact(self._refilled_tokens(model, step, torch.no_grad))

    def test_neither_is_wrong(self, model, step, unchecked_update, monkeypatch):
        monkeypatch.setattr(state.PageSummaryState, "invalidate", lambda self: None)
        assert not self._is_exact(self._refilled_tokens(model, step, torch.no_grad))

    def test_inference_mode_without_the_device_check_is_wrong(self, model, step, unchecked_update):
        assert not self._is_exact(self._refilled_tokens(model, step, torch.inference_mode))

    @pytest.fixture
    def unchecked_update(self):
        """quest::update_page_summary that believes num_sealed."""

        def update(key_cache, cache_position, page_summary, num_sealed, *, page_size=16):
            first = min(int(num_sealed), int(cache_position.min()) // page_size)
            last = (int(cache_position.max()) + 1) // page_size
            for page in range(first, last):
                keys = key_cache[:, :, page * page_size : (page + 1) * page_size]
                page_summary[:, :, page] = torch.stack([keys.amin(2), keys.amax(2)], 2)
            num_sealed.fill_(last)

        library = torch.library.Library("quest", "IMPL")
        library.impl("update_page_summary", update, "CPU", allow_override=True)
        yield
        library._destroy()
