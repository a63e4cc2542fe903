"""Whatever happened to a cache before, decoding gives the tokens of a fresh run."""

import copy
import gc
import itertools
import sys
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


def test_a_saved_cache_loads_and_is_on_its_own(model, step, tmp_path):
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        expected = decode(step, cache, prompt[:, -1:], LENGTH - 1)
        rewind(cache, LENGTH - 1)
        torch.save([(layer.keys, layer.values) for layer in cache.layers], tmp_path / "cache.pt")
        loaded = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        for layer, (keys, values) in zip(loaded.layers, torch.load(tmp_path / "cache.pt")):
            layer.keys, layer.values = keys, values
        assert decode(step, loaded, prompt[:, -1:], LENGTH - 1) == expected


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


def decode_row(step, cache, tokens, row):
    rewind(cache, LENGTH - 1)
    found = []
    for i in range(STEPS):
        tokens = greedy_step(step, cache, tokens, LENGTH - 1 + i)
        found.append(int(tokens[row]))
    return found


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


def is_exact(caches):
    """Do all complete pages of all layers have the summary of their keys?"""
    for cache in caches:
        for layer in cache.layers:
            length = int(layer.cumulative_length)
            summary = summary_of(layer.keys)
            expected = ops.build_page_summary(layer.keys, torch.tensor([length]))
            if not torch.equal(summary[:, :, : length // 16], expected[:, :, : length // 16]):
                return False
    return True


def summary_of(key_cache):
    return key_cache._quest_page_summaries[16].page_summary


def update_that_trusts(what):
    """quest::update_page_summary without its own look at the keys, or at the position."""

    def update(key_cache, cache_position, page_summary, num_sealed, *, page_size=16):
        first = int(num_sealed)
        if what == "num_sealed":
            first = min(first, int(cache_position.min()) // page_size)
        last = (int(cache_position.max()) + 1) // page_size
        for page in range(first, last):
            keys = key_cache[:, :, page * page_size : (page + 1) * page_size]
            page_summary[:, :, page] = torch.stack([keys.amin(2), keys.amax(2)], 2)
        num_sealed.fill_(last if what == "num_sealed" else max(first, last))

    return update


@pytest.fixture
def sabotage(monkeypatch):
    """Takes checks out: "version", "sampled pages", "position", "state per cache"."""
    libraries = []

    def replace_update(what):
        libraries.append(torch.library.Library("quest", "IMPL"))
        libraries[-1].impl(
            "update_page_summary", update_that_trusts(what), "CPU", allow_override=True
        )

    def take_out(*checks):
        if "version" in checks:
            monkeypatch.setattr(state.PageSummaryState, "invalidate", lambda self: None)
        if "position" in checks:
            replace_update("nothing but num_sealed")
        elif "sampled pages" in checks:
            replace_update("num_sealed")
        if "state per cache" in checks:
            shared = {}

            def state_of_nobody(key_cache, page_size):
                # The layers of a model are told apart, its caches are not.
                made = state.PageSummaryState(key_cache, page_size)
                layer = len(shared) if len(shared) < 4 else next(turn) % 4
                found = shared.setdefault(layer, made)
                key_cache._quest_page_summaries = {page_size: found}
                return found

            turn = itertools.count()
            monkeypatch.setattr(sys.modules["quest_compile.backend"], "state_of", state_of_nobody)

    yield take_out
    for library in libraries:
        library._destroy()


@grad_modes
@pytest.mark.parametrize("case", CASES)
def test_all_checks_together_keep_every_summary_exact(model, step, mode, case):
    with mode():
        assert is_exact(CASES[case](model, step))


@pytest.mark.parametrize("check", ["version", "sampled pages"])
@pytest.mark.parametrize("case", ["refilled", "refilled_by_a_compiled_prefill"])
def test_either_check_alone_notices_a_refill(model, step, sabotage, case, check):
    sabotage(check)
    with torch.no_grad():
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
def test_without_its_checks_a_summary_goes_stale(model, step, sabotage, case, mode, checks):
    """The tests above can fail: each case does when what protects it is taken out."""
    sabotage(*checks)
    with mode():
        assert not is_exact(CASES[case](model, step))


def test_caches_of_growing_length_share_a_dynamic_graph(model):
    torch._dynamo.reset()
    backend = quest_compile.backend(budget=80, inner="aot_eager")
    step = torch.compile(model, backend=backend)
    prompt = random_prompt(1, LENGTH)
    runs = []
    with torch.no_grad():
        for max_seq_len in (200, 233, 301, 512):
            cache = prefill(model, prompt[:, :-1], max_seq_len)
            runs.append(decode(step, cache, prompt[:, -1:], LENGTH - 1))
    assert runs == [runs[0]] * 4
    assert len(backend.report().graphs) == 2
