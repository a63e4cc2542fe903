"""OffloadedStaticCache: the tokens of a cache in memory, in one process and in the next."""

import copy
import gc
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import FAMILIES, SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import OffloadedStaticCache, ops, state
from quest_compile.decoding import cache_names, greedy_step, rewind, step_inputs

LENGTH, MAX_SEQ_LEN, STEPS = 200, 300, 12
SETTINGS = SHORT | {"budget": 64, "inner": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def decode(step, cache, token, position=LENGTH, steps=STEPS):
    tokens = []
    with torch.no_grad():
        for i in range(steps):
            token = greedy_step(step, cache, token, position + i)
            tokens.append(token.flatten().tolist())
    return tokens


def read(call, cache, prompt):
    with torch.no_grad():
        call(**step_inputs(cache, prompt, 0))
    return cache


def in_memory(model):
    return transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)


def in_file(model, folder, **settings):
    return OffloadedStaticCache(model.config, MAX_SEQ_LEN, path=folder / "book.kv", **settings)


def reopened(cache, model, folder, **arguments):
    cache.close()
    return OffloadedStaticCache.open(model.config, folder / "book.kv", **arguments)


def is_of_file(tensor):
    addresses = (line.split(None, 5) for line in open("/proc/self/maps"))
    return any(
        int(first, 16) <= tensor.data_ptr() < int(last, 16) and rest[-1].strip().endswith(".kv")
        for where, *rest in addresses
        for first, last in [where.split("-")]
    )


@pytest.mark.parametrize(
    ("batch", "dtype", "prefill"), [(1, torch.float32, "eager"), (3, torch.bfloat16, "compiled")]
)
def test_it_gives_the_tokens_of_a_cache_in_memory(batch, dtype, prefill, tmp_path):
    model, prompt = tiny_model("llama").to(dtype), random_prompt(batch, LENGTH)
    step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
    call = model if prefill == "eager" else step
    expected = decode(step, read(call, in_memory(model), prompt), prompt[:, -1:])
    cache = read(call, in_file(model, tmp_path), prompt)
    ops.reset_counters()
    assert decode(step, cache, prompt[:, -1:]) == expected
    assert ops.counters()["sparse_calls"] == 2 * STEPS
    cache.save()
    assert [is_of_file(layer.values) for layer in cache.layers] == [False, False, True, True]
    cache = reopened(cache, model, tmp_path)
    assert int(cache.get_seq_length()) == LENGTH + STEPS
    rewind(cache, LENGTH)
    assert decode(step, cache, prompt[:, -1:]) == expected


def test_a_reopened_cache_scores_at_once(tmp_path):
    model, prompt = tiny_model("llama"), random_prompt(1, LENGTH)
    cache = read(model, in_file(model, tmp_path), prompt)
    cache.save(prompt)
    step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
    expected = decode(step, cache, prompt[:, -1:], steps=5)
    cache = reopened(cache, model, tmp_path, tokens=prompt)
    ops.reset_counters()
    assert decode(step, cache, prompt[:, -1:], steps=5) == expected
    counted = ops.counters()
    assert counted["sparse_calls"] == 2 * 5
    assert counted["pages_sealed"] == counted["summaries_rebuilt"] == 0


def test_a_backend_with_other_page_summaries_makes_its_own_and_says_so(tmp_path, caplog):
    state._note_other_format.cache_clear()
    model, prompt = tiny_model("llama"), random_prompt(1, LENGTH)
    cache = read(model, in_file(model, tmp_path, summary="minmax", page_size=8), prompt)
    cache.save(prompt)
    cache = reopened(cache, model, tmp_path)
    step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
    ops.reset_counters()
    with caplog.at_level(logging.WARNING):
        found = decode(step, cache, prompt[:, -1:])
    assert found == decode(step, read(model, in_memory(model), prompt), prompt[:, -1:])
    assert "page summaries of page_size 8, summary minmax, and page_size 16" in caplog.text
    assert ops.counters()["pages_sealed"] > 2 * 2 * (LENGTH // 16)


def test_compiled_steps_in_front_of_the_saved_end_withdraw_the_file(tmp_path):
    model, prompt = tiny_model("llama"), random_prompt(1, LENGTH)
    cache = read(model, in_file(model, tmp_path), prompt)
    cache.save(prompt)
    step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
    decode(step, cache, prompt[:, -1:], steps=2)
    reopened(cache, model, tmp_path, tokens=prompt).close()
    gc.collect()
    cache = OffloadedStaticCache.open(model.config, tmp_path / "book.kv")
    for layer in cache.layers:
        layer.cumulative_length.fill_(LENGTH - 1)
    decode(step, cache, prompt[:, -1:], LENGTH - 1, steps=2)
    with pytest.raises(ValueError, match="in front of the end of what had been saved"):
        reopened(cache, model, tmp_path)


NEXT_TURN = """
import sys, torch, quest_compile
from quest_compile import ops
from test_offloaded_cache import SETTINGS, generate, tiny_model
path, ids = sys.argv[1], torch.tensor([[int(x) for x in sys.argv[2].split()]])
model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS, strict=True)
cache = quest_compile.OffloadedStaticCache.open(model.config, path, tokens=ids, model=model)
print(*generate(model, ids, cache)[0].tolist())
assert ops.counters()["sparse_calls"] == 2 * 5, ops.counters()
"""


def generate(model, tokens, cache):
    settings = {"max_new_tokens": 6, "do_sample": False, cache_names()[0]: cache}
    return model.generate(tokens, **settings)


def test_generate_goes_on_in_the_next_turn_and_in_the_next_process(tmp_path):
    model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS, strict=True)
    turns = {}
    for name, cache in (("memory", in_memory(model)), ("file", in_file(model, tmp_path))):
        one = generate(model, random_prompt(1, LENGTH), cache)
        if name == "file":
            cache.save(one)
        two = torch.cat([one, random_prompt(1, 7, seed=2)], 1)
        turns[name] = (one.tolist(), generate(model, two, cache).tolist())
    assert turns["file"] == turns["memory"]
    assert ops.counters()["sparse_calls"] == 2 * 2 * 2 * 5
    cache.close()
    command = [sys.executable, "-c", NEXT_TURN, str(tmp_path / "book.kv")]
    ids = " ".join(map(str, two[0].tolist()))
    done = subprocess.run([*command, ids], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert [int(x) for x in done.stdout.split()] == turns["memory"][1][0]


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_what_writes_it_must_fit(tmp_path):
    model, prompt = tiny_model("llama"), random_prompt(2, 40)
    cache = in_file(model, tmp_path)
    with pytest.raises(ValueError, match="save: expected a cache with tokens"):
        cache.save()
    read(model, cache, prompt)
    with pytest.raises(ValueError, match="cache has batch 2, 2 heads of 16 .*got 1, 2 of 16"):
        read(model, cache, prompt[:1])
    with pytest.raises(ValueError, match="torch.float32; got 2, 2 of 16, torch.bfloat16"):
        read(copy.deepcopy(model).bfloat16(), cache, prompt)
    with pytest.raises(ValueError, match=r"tokens: expected \[2, 40\] or more .*got \[2, 39\]"):
        cache.save(prompt[:, :39])
    with pytest.raises(ValueError, match=r"tokens: expected integers .*got torch.float32 \[40\]"):
        cache.save(torch.zeros(40))
    on_meta = torch.zeros(1, 2, 1, 16, device="meta")
    with pytest.raises(ValueError, match="for CPUs, and the keys are on meta: use a StaticCache"):
        OffloadedStaticCache(model.config, 64, path=tmp_path / "other.kv").update(
            on_meta, on_meta, 0
        )


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "have a StaticSlidingWindowLayer: use a StaticCache"),
        ("t5", "models with an encoder keep two caches"),
    ],
)
def test_models_that_it_does_not_fit_are_refused(family, message, tmp_path):
    config = transformers.T5Config() if family == "t5" else tiny_model(family).config
    with pytest.raises(ValueError, match=f"config: .*{message}"):
        OffloadedStaticCache(config, 64, path=tmp_path / "book.kv")
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_logits_or_is_refused(family, tmp_path):
    line, tokens = FAMILIES[family], random_prompt(1, 40)
    try:
        model = tiny_model(family)
    except Exception as error:
        pytest.skip(f"not in this transformers: {error}")

    def logits(cache):
        found = []
        with torch.no_grad():
            for begin, end in ((0, 38), (38, 39), (39, 40)):
                inputs = step_inputs(cache, tokens[:, begin:end], begin)
                if line.positions:
                    inputs["position_ids"] = torch.arange(begin, end)[None]
                if line.full_mask:
                    inputs["attention_mask"] = (torch.arange(MAX_SEQ_LEN) < end).long()[None]
                found.append(model(**inputs).logits)
        return torch.cat(found, 1)

    try:
        cache = in_file(model, tmp_path)
    except ValueError as error:
        assert "all layers of the model have to attend the whole context" in str(error)
        return
    assert torch.equal(logits(cache), logits(in_memory(model)))
    cache.save(tokens)
    assert int(reopened(cache, model, tmp_path, tokens=tokens).get_seq_length()) == 40


def test_arguments_are_checked(tmp_path):
    config, path = tiny_model("llama").config, tmp_path / "book.kv"
    with pytest.raises(ValueError, match="max_cache_len: expected 1 or more, got 0"):
        OffloadedStaticCache(config, 0, path=path)
    with pytest.raises(TypeError, match="config: expected the configuration of a model, got Lla"):
        OffloadedStaticCache(tiny_model("llama"), 64, path=path)
    with pytest.raises(ValueError, match="summary: expected one of 'minmax', 'sketch', got 'x'"):
        OffloadedStaticCache(config, 64, path=path, summary="x")
    with pytest.raises(TypeError, match="path"):
        OffloadedStaticCache(config, 64)
    assert not list(tmp_path.iterdir())


def test_it_is_not_copied_and_not_reordered(tmp_path):
    model = tiny_model("llama")
    cache = read(model, in_file(model, tmp_path), random_prompt(1, 40))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="is its file and cannot be copied: go back with rew"):
            copied(cache)
    with pytest.raises(ValueError, match="beam search copies the rows of a cache"):
        cache.reorder_cache(torch.tensor([0]))


class Tokenizer:
    def __call__(self, text, return_tensors):
        ids = torch.tensor([list(text.encode())])
        return transformers.BatchEncoding({"input_ids": ids})


def test_the_recipes_of_the_document_run(tmp_path, monkeypatch):
    document = Path(__file__).resolve().parents[1] / "docs" / "caches_on_files.md"
    use, settings = re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.DOTALL)
    use = use.replace("256", "6").replace("budget=2048", 'budget=64, inner="eager", strict=True')
    monkeypatch.chdir(tmp_path)
    model, answers = tiny_model("llama"), []
    for _ in range(2):
        names = {"model": model, "tokenizer": Tokenizer(), "book": "To be, or not to be. " * 12}
        exec(use, names | {"question": "Or?"}, made := {})
        answers.append(made["answer"].tolist())
        assert int(made["cache"].get_seq_length()) == 252 + 3 + 5
        made["cache"].close()
        # The second time nothing is read.
        use = use.replace("model(ids, past", "nothing_reads(ids, past")
    assert answers[0] == answers[1] and ops.counters()["sparse_calls"] == 2 * 2 * 5
    names = {"torch": torch, "quest_compile": quest_compile, "model": model}
    exec(settings, names | {"OffloadedStaticCache": OffloadedStaticCache}, made)
    assert made["cache"].layers[2]._record.page_format.page_size == 128
