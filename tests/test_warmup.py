"""After a warm-up, the first request compiles nothing."""

import io
import sys

import pytest
import torch
import transformers
from tiny_models import NUM_LAYERS, SHORT, left_padded_prompt, random_prompt, tiny_model
from torch._dynamo.utils import counters

import quest_compile
from quest_compile import ops
from quest_compile.decoding import cache_names, greedy_step, prefill

MAX_SEQ_LEN = 256
SETTINGS = SHORT | {"budget": 64, "inner": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    ops.reset_counters()


def num_graphs():
    return counters["stats"]["unique_graphs"]


def generate(model, batch, length, max_new_tokens=6):
    prompt = random_prompt(batch, length)
    return model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)[:, length:]


class TestGenerate:
    def test_the_first_request_compiles_nothing(self):
        model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        report = quest_compile.warmup(model, MAX_SEQ_LEN)
        assert num_graphs() == len(report.graphs) == 1
        assert (report.count("sparse"), report.count("dense")) == (NUM_LAYERS - 2, 2)
        ops.reset_counters()
        for length, max_new_tokens in ((200, 6), (20, 4), (240, MAX_SEQ_LEN - 240)):
            generate(model, 1, length, max_new_tokens)
        assert num_graphs() == 1
        assert ops.counters()["sparse_calls"] > 0

    def test_all_batch_sizes_asked_for_are_compiled(self):
        model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        quest_compile.warmup(model, MAX_SEQ_LEN, batch_sizes=[1, 4, 2])
        num_warm = num_graphs()
        assert num_warm <= 3
        for batch in (4, 1, 2):
            generate(model, batch, 200)
        tokens, attention_mask = left_padded_prompt([200, 50])
        model.generate(tokens, attention_mask=attention_mask, max_new_tokens=6)
        assert num_graphs() == num_warm

    def test_the_request_gets_the_tokens_it_gets_without_warm_up(self):
        cold = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        expected = generate(cold, 1, 200)
        warm = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        quest_compile.warmup(warm, MAX_SEQ_LEN)
        assert torch.equal(generate(warm, 1, 200), expected)

    def test_settings_of_the_user_survive_and_do_not_matter(self):
        model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        own = {"max_new_tokens": 5, "do_sample": True, "top_k": 7, "eos_token_id": [0, 3]}
        model.generation_config.update(num_beams=2, min_new_tokens=4, **own)
        quest_compile.warmup(model, MAX_SEQ_LEN)
        assert num_graphs() == 1
        assert {name: getattr(model.generation_config, name) for name in own} == own

    def test_a_second_warm_up_compiles_nothing_and_returns_the_report(self):
        model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        first = quest_compile.warmup(model, MAX_SEQ_LEN)
        assert quest_compile.warmup(model, MAX_SEQ_LEN).rows == first.rows
        assert num_graphs() == 1


class TestCompiledModels:
    @pytest.mark.parametrize("how", ["torch.compile", "by name", "model.compile"])
    def test_the_first_steps_compile_nothing(self, how):
        model = step = tiny_model("llama")
        if how == "torch.compile":
            step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
        elif how == "by name":
            step = torch.compile(model, backend="quest", options=SETTINGS)
        else:
            model.compile(backend=quest_compile.backend(**SETTINGS))
        report = quest_compile.warmup(step, MAX_SEQ_LEN)
        num_warm = num_graphs()
        assert report.count("sparse") >= NUM_LAYERS - 2
        cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
        with torch.no_grad():
            model.forward(random_prompt(1, 200), past_key_values=cache)
            for _ in range(3):
                step(random_prompt(1, 1), past_key_values=cache)
        assert num_graphs() == num_warm == len(cache_names())

    @pytest.mark.parametrize("name", cache_names())
    def test_the_cache_is_warm_under_every_name_it_has(self, name, recwarn):
        model = tiny_model("llama")
        step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
        quest_compile.warmup(step, MAX_SEQ_LEN)
        num_warm = num_graphs()
        cache = prefill(model, random_prompt(1, 200), MAX_SEQ_LEN)
        quest_compile.explain(model, **SETTINGS)
        assert not [w for w in recwarn if "past_key_values" in str(w.message)]
        num_explained = num_graphs()
        ops.reset_counters()
        with torch.no_grad():
            step(random_prompt(1, 1), **{name: cache})
        assert cache.get_seq_length() == 201
        assert ops.counters()["sparse_calls"] == NUM_LAYERS - 2
        assert num_graphs() == num_explained
        assert num_warm == len(cache_names())

    def test_an_own_way_of_calling_is_compiled(self):
        model = tiny_model("llama")
        step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))

        def call(tokens, cache):
            greedy_step(step, cache, tokens, cache.get_seq_length())

        quest_compile.warmup(step, MAX_SEQ_LEN, call=call)
        num_warm = num_graphs()
        cache = prefill(model, random_prompt(1, 200), MAX_SEQ_LEN)
        with torch.no_grad():
            call(random_prompt(1, 1), cache)
        assert num_graphs() == num_warm == 1

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_warm_up_under_inference_mode_serves_inference_mode(self, mode):
        model = tiny_model("llama")
        step = torch.compile(model, backend=quest_compile.backend(**SETTINGS))
        with mode():
            quest_compile.warmup(step, MAX_SEQ_LEN)
            num_warm = num_graphs()
            cache = prefill(model, random_prompt(1, 200), MAX_SEQ_LEN)
            step(random_prompt(1, 1), past_key_values=cache)
        assert num_graphs() == num_warm == len(cache_names())
        assert ops.counters()["sparse_calls"] > 0


class _Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    @pytest.mark.parametrize(
        ("stream", "progress", "is_shown"),
        [(_Terminal, True, True), (_Terminal, False, False), (io.StringIO, True, True)],
    )
    def test_how_far_it_is_is_shown(self, monkeypatch, stream, progress, is_shown):
        monkeypatch.setattr("quest_compile.progress._SECONDS_BEFORE", 0)
        monkeypatch.setattr("quest_compile.progress._SECONDS_BETWEEN_LINES", 0)
        model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        monkeypatch.setattr(sys, "stderr", stream())
        quest_compile.warmup(model, MAX_SEQ_LEN, progress=progress)
        text = sys.stderr.getvalue()
        if is_shown:
            assert "quest_compile: warm-up: batch size 1: 100%" in text
            assert "3/3" in text
        else:
            assert "warm-up" not in text


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"max_cache_len": 32.0}, TypeError, "max_cache_len must be an int, got 32.0"),
            ({"max_cache_len": True}, TypeError, "max_cache_len must be an int"),
            ({"max_cache_len": 0}, ValueError, "max_cache_len must be more than 3, got 0"),
            ({"max_cache_len": 64, "batch_sizes": 0}, ValueError, "batch_sizes must be positive"),
            ({"max_cache_len": 64, "batch_sizes": []}, ValueError, "batch_sizes must be positive"),
            ({"max_cache_len": 64, "batch_sizes": [1, "2"]}, ValueError, "batch_sizes must be po"),
            ({"max_cache_len": 64, "batch_sizes": "12"}, TypeError, "batch_sizes must be an int"),
            ({"max_cache_len": 64, "batch_sizes": None}, TypeError, "batch_sizes must be an int"),
            ({"max_cache_len": 64, "call": print}, ValueError, "call: generate.. calls this model"),
        ],
    )
    def test_the_argument_is_named(self, arguments, error, message):
        model = quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)
        with pytest.raises(error, match=message):
            quest_compile.warmup(model, **arguments)
        assert num_graphs() == 0

    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            (lambda m: m, "LlamaForCausalLM. is not compiled by Quest: call .*compile_for_gen"),
            (lambda m: m.lm_head, "model .Linear. is not compiled by Quest"),
            (torch.compile, "model is compiled, but with 'inductor', not quest_compile.backend"),
            (lambda m: torch.compile(m, backend="eager"), "compiled, but with eager"),
            (
                lambda m: torch.compile(m.lm_head, backend=quest_compile.backend(**SETTINGS)),
                "must be a transformers model, got Linear",
            ),
        ],
    )
    def test_a_model_that_quest_does_not_compile_is_refused(self, prepare, message):
        with pytest.raises(TypeError, match=message):
            quest_compile.warmup(prepare(tiny_model("llama")), MAX_SEQ_LEN)
