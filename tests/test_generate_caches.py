"""generate() of a prepared model with caches of the user, over several turns, and with longrope."""

import re
import threading
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.dense_causes import DenseCause

SETTINGS = SHORT | {"budget": 64, "inner": "eager"}
# Covers every context here: the sparse operator runs and gives dense tokens.
COVERING = SETTINGS | {"budget": 512}
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "generate.md"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def prepared(family="llama", config=None, **settings):
    model = tiny_model(family, **(config or {}))
    return quest_compile.compile_for_generate(model, **SETTINGS | settings)


def static_cache(model, max_cache_len=640):
    return transformers.StaticCache(config=model.config, max_cache_len=max_cache_len)


def generate(model, tokens, **arguments):
    return model.generate(tokens, max_new_tokens=6, do_sample=False, **arguments)


def test_a_static_cache_that_is_passed_is_filled_and_decoded_sparsely():
    model, prompt = prepared(strict=True), random_prompt(1, 200)
    cache = static_cache(model)
    assert torch.equal(generate(model, prompt, past_key_values=cache), generate(model, prompt))
    assert ops.counters()["sparse_calls"] == 2 * 5 * 2
    assert int(cache.get_seq_length()) == 205


def test_a_dynamic_cache_that_is_passed_is_filled_and_the_call_is_dense():
    model, prompt = prepared(), random_prompt(1, 200)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.warns(UserWarning, match=DenseCause.OTHER_CACHE.value):
        found = generate(model, prompt, past_key_values=cache)
    assert torch.equal(found, generate(tiny_model("llama"), prompt))
    assert cache.get_seq_length() == 205 and ops.counters()["sparse_calls"] == 0


def test_a_cache_that_is_too_short_is_named_before_anything_runs():
    model, prompt = prepared(), random_prompt(1, 200)
    generate(model, prompt, past_key_values=static_cache(model, 205))
    with pytest.raises(ValueError, match="cache passed has 204 positions, but 200 tokens .* 205"):
        generate(model, prompt, past_key_values=static_cache(model, 204))


def test_turns_over_one_cache_give_the_tokens_of_one_call_each():
    model = prepared(**COVERING)
    cache, tokens = static_cache(model), random_prompt(1, 100)
    for turn in range(3):
        tokens = torch.cat([tokens, random_prompt(1, 7, seed=turn)], 1)
        expected = generate(tiny_model("llama"), tokens)
        tokens = generate(model, tokens, past_key_values=cache)
        assert torch.equal(tokens, expected)
        assert int(cache.get_seq_length()) == tokens.shape[1] - 1
    assert ops.counters()["sparse_calls_covered"] == 3 * 5 * 2


FACTORS = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONGROPE = {"original_max_position_embeddings": 64, "rope_scaling": FACTORS}


@pytest.mark.parametrize("length", [61, 65])
def test_longrope_is_sparse_on_both_sides_of_the_original_length(length):
    """61: the second factors come into force while decoding, and the cache is filled anew."""
    prompt = random_prompt(1, length)
    expected = generate(tiny_model("phi3", **LONGROPE), prompt, use_cache=False)
    model = prepared("phi3", LONGROPE, **COVERING, strict=True)
    assert torch.equal(generate(model, prompt, max_cache_len=640), expected)
    num_filled_anew = int(length < 65)
    assert ops.counters()["sparse_calls_covered"] == (5 - num_filled_anew) * 2


class Tokenizer:
    """Ids as text, and back."""

    eos_token_id = pad_token_id = None

    def apply_chat_template(self, messages, **settings):
        text = " ".join(message["content"] for message in messages)
        ids = torch.tensor([[int(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def __call__(self, text, return_tensors=None):
        return transformers.BatchEncoding(self.apply_chat_template([{"content": text}]))

    def decode(self, ids, **settings):
        return "".join(f"{int(i)} " for i in ids)


def recipe(title):
    """The Python of this section of docs/generate.md, with fewer tokens."""
    section = DOCUMENT.read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1].replace("256", "16")


@pytest.mark.parametrize("title", ["A chat of several turns", "Streaming"])
def test_the_recipes_of_the_document_run_and_are_sparse(title, capsys):
    question = Tokenizer().decode(random_prompt(1, 200)[0]).strip()
    before = set(threading.enumerate())
    names = {"model": prepared(strict=True), "tokenizer": Tokenizer(), "text": question}
    exec(recipe(title), names | {"questions": [question, "5 6 7"]})
    printed = capsys.readouterr().out
    assert len(printed.split()) > 10
    assert ops.counters()["sparse_calls"] > 10
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
