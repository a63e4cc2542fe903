"""Prefill through quest::dense_prefill: what SDPA gives, in every way to fill a cache."""

import pytest
import torch
import transformers
from tiny_models import FAMILIES, SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig
from quest_compile.decoding import step_inputs

LENGTH, MAX_SEQ_LEN = 100, 256
SETTINGS = SHORT | {"prefill": "dense", "inner": "eager"}
TOLERANCE = 2e-5

pytestmark = [
    pytest.mark.skipif(not ops.native_status().loaded, reason="plain torch serves: SDPA prefills"),
    pytest.mark.skipif(transformers.__version__ < "5", reason="another static cache"),
]


def compiled(model, **settings):
    torch._dynamo.reset()
    ops.reset_counters()
    backend = QuestBackend(QuestConfig(**SETTINGS | settings))
    return backend, torch.compile(model, backend=backend)


def logits_of(call, model, prompt, chunk=LENGTH, cache=None, mask=None):
    """Of every token, [B, LENGTH, vocabulary]."""
    cache = cache or transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
    found, position = [], 0
    with torch.no_grad():
        for some in prompt.split(chunk, 1):
            inputs = step_inputs(cache, some, position)
            position += some.shape[1]
            if mask is not None:
                inputs["attention_mask"] = mask[:, :position]
            found.append(call(**inputs).logits)
    return torch.cat(found, 1)


def assert_same(logits, expected, live=None):
    live = torch.ones(expected.shape[:2], dtype=torch.bool) if live is None else live
    logits, expected = logits[live], expected[live]
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "family",
    [
        name if line.generate == "always" else pytest.param(name, marks=pytest.mark.nightly)
        for name, line in FAMILIES.items()
        if hasattr(transformers, line.model) and not (line.full_mask or line.positions)
    ],
)
def test_every_family_prefills_what_sdpa_does(family):
    model, prompt = tiny_model(family), random_prompt(1, LENGTH)
    backend, step = compiled(model)
    assert_same(logits_of(step, model, prompt), logits_of(model, model, prompt))
    rows = [row for row in backend.report().rows if row.attention != "sdpa"]
    assert ops.counters()["prefill_calls"] == len(rows)
    if model.config._attn_implementation == "sdpa":
        assert rows


@pytest.mark.parametrize("chunk", [LENGTH, 40])
def test_chunks_over_new_and_used_caches(chunk):
    model, prompt = tiny_model("llama"), random_prompt(2, LENGTH)
    _, step = compiled(model)
    expected = logits_of(model, model, prompt)
    cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
    for used in range(2):
        assert_same(logits_of(step, model, prompt, chunk, cache), expected)
        assert ops.counters()["prefill_calls"] == (used + 1) * 4 * -(-LENGTH // chunk)
        cache.reset()


def test_left_padding():
    model, prompt = tiny_model("llama"), random_prompt(2, LENGTH)
    live = torch.ones_like(prompt)
    live[0, :30] = 0
    _, step = compiled(model)
    logits, expected = (logits_of(x, model, prompt, mask=live) for x in (step, model))
    assert_same(logits, expected, live.bool())
    assert ops.counters()["prefill_calls"] == 4


def test_sdpa_stays_where_it_is_asked_for():
    model, prompt = tiny_model("llama"), random_prompt(1, LENGTH)
    backend, step = compiled(model, prefill="sdpa")
    logits_of(step, model, prompt)
    assert ops.counters()["prefill_calls"] == 0
    assert {row.attention for row in backend.report().rows} <= {"sdpa", "sdpa + page summary"}


def test_the_report_says_what_prefills():
    model, prompt = tiny_model("llama"), random_prompt(1, LENGTH)
    backend, step = compiled(model, budget=48)
    for _ in range(2):
        cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
        logits_of(step, model, prompt, 50, cache)
    found = {row.attention for row in backend.report().rows}
    assert {"quest::dense_prefill", "quest::dense_prefill + page summary"} <= found


GENERATE = SHORT | {"budget": 64, "num_dense_layers": 1, "inner": "eager"}


def generated(prompt, mask=None, cache=None, prefill="dense", **settings):
    torch._dynamo.reset()
    ops.reset_counters()
    model = quest_compile.compile_for_generate(tiny_model("llama"), **GENERATE, prefill=prefill)
    mask = torch.ones_like(prompt) if mask is None else mask
    settings = {"max_new_tokens": 8, "do_sample": False} | settings
    out = model.generate(prompt, attention_mask=mask, past_key_values=cache, **settings)
    return out[:, prompt.shape[1] :], ops.counters()


@pytest.mark.parametrize("chunk", [None, 60])
def test_generate_prefills_through_it_with_the_same_tokens(chunk):
    prompt, mask = random_prompt(2, 200), torch.ones(2, 200, dtype=torch.int64)
    mask[0, :30] = 0
    expected, counts = generated(prompt, mask, prefill="sdpa")
    assert counts["prefill_calls"] == 0
    chunks = {} if chunk is None else {"prefill_chunk_size": chunk}
    tokens, counts = generated(prompt, mask, **chunks)
    assert torch.equal(tokens, expected)
    assert counts["prefill_calls"] == 4 * (4 if chunk else 1) and counts["sparse_calls"] > 0


def test_a_cache_that_holds_tokens_is_continued_as_without():
    """The chunks of transformers would begin anew."""
    prompt = random_prompt(1, 200)

    def second_turn(prefill):
        config = tiny_model("llama").config
        cache = transformers.StaticCache(config=config, max_cache_len=320)
        first, counts = generated(prompt, cache=cache, prefill=prefill)
        longer = torch.cat([prompt, first, prompt[:, :30]], 1)
        return generated(longer, cache=cache, prefill=prefill)[0], counts

    tokens, counts = second_turn("dense")
    assert counts["prefill_calls"] > 0
    assert torch.equal(tokens, second_turn("sdpa")[0])


def test_restore_gives_back_the_chunk_size():
    model = tiny_model("llama")
    model.generation_config.prefill_chunk_size = 32
    quest_compile.compile_for_generate(model, **GENERATE, prefill="dense")
    assert model.generation_config.prefill_chunk_size == 32
    quest_compile.restore(model)
    assert model.generation_config.prefill_chunk_size == 32
    model.generation_config.prefill_chunk_size = None
    quest_compile.compile_for_generate(model, **GENERATE, prefill="dense")
    assert model.generation_config.prefill_chunk_size == 4096
    quest_compile.compile_for_generate(model, **GENERATE, prefill="sdpa")
    assert model.generation_config.prefill_chunk_size is None


@pytest.mark.parametrize("value", ["sample", True, None])
def test_another_way_to_prefill_is_an_error(value):
    with pytest.raises(ValueError, match="prefill: expected one of 'auto', 'sdpa', 'dense', got"):
        quest_compile.backend(prefill=value)
