"""What a user sees: one line compiles the model, a report says what happened, errors are clear."""

import copy
import dataclasses
import inspect
import json
import logging
import os
import pickle
import pydoc
import re
import subprocess
import sys
import warnings

import pytest
import torch
from tiny_models import FEW_PAGES, NUM_LAYERS, SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.config import QuestSettings
from quest_compile.decoding import greedy_step, prefill

LENGTH, MAX_SEQ_LEN = 200, 512


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def decode(step, model, steps=3, grad_mode=torch.no_grad):
    """Greedy tokens of ``step`` after a prompt of LENGTH tokens."""
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    tokens, token = [], prompt[:, -1:]
    with grad_mode():
        for i in range(steps):
            token = greedy_step(step, cache, token, LENGTH - 1 + i)
            tokens.append(int(token))
    return tokens


def test_one_line_replaces_attention_behind_the_dense_layers(model):
    backend = quest_compile.backend(**SHORT, budget=64, inner="aot_eager")
    decode(torch.compile(model, backend=backend), model)
    (graph,) = backend.report().graphs
    assert [row.treatment.value for row in graph.rows] == ["dense", "dense", "sparse", "sparse"]
    assert [row.attention for row in graph.rows] == ["quest::dense_decode"] * 2 + [
        "quest::sparse_decode"
    ] * 2
    assert [row.tokens for row in graph.rows] == [MAX_SEQ_LEN] * 2 + [64] * 2
    assert graph.rows[2].pages == 4
    counted = ops.counters()
    assert counted["sparse_calls"] == 2 * 3
    assert 48 < counted["max_tokens_attended"] <= 64


def test_budget_that_covers_the_context_gives_dense_tokens(model):
    step = torch.compile(
        model, backend=quest_compile.backend(**SHORT, budget=256, inner="aot_eager")
    )
    assert decode(step, model) == decode(model, model)
    assert ops.counters()["sparse_calls_covered"] == 2 * 3


def test_report_is_a_table_with_reasons_and_source_lines(model):
    backend = quest_compile.backend(**SHORT, budget=64, inner="eager")
    decode(torch.compile(model, backend=backend), model, steps=1)
    text = str(backend.report())
    assert "4 attention calls: 2 sparse, 2 dense, 0 untouched" in text
    assert "one of the first num_dense_layers layers" in text
    assert "sdpa_attention.py:" in text
    assert json.loads(json.dumps(backend.report().as_dict()))["graphs"][0]["rows"]


def test_report_shows_the_settings_in_use_and_what_is_the_capacity_of_the_cache(model):
    settings = {"summary": "sketch", "sketch_bits": 2, "group_reduce": "none", "top_p": 0.95}
    backend = quest_compile.backend(**SHORT, budget=64, inner="eager", **settings)
    decode(torch.compile(model, backend=backend), model, steps=1)
    lines = str(backend.report()).splitlines()
    assert (
        "budget 64, page_size 16, summary sketch of 2 bits, group_reduce none, "
        "num_sink_pages 1, num_recent_pages 2, top_p 0.95, inner eager"
    ) in lines
    for row in backend.report().rows:
        capacity = row.treatment.value == "dense"
        (line,) = [x for x in lines if re.match(rf"{row.layer} +{row.treatment.value}", x)]
        assert (f" {row.tokens} (cache) " in line) is capacity
        assert (f" {row.tokens}  " in line) is not capacity


def test_report_names_the_likely_reason_when_nothing_was_compiled(model):
    backend = quest_compile.backend(**SHORT, budget=80)
    torch.compile(model, backend=backend).generate(random_prompt(1, 8), max_new_tokens=2)
    text = str(backend.report())
    assert "no graph was compiled" in text
    assert "compile_for_generate" in text


def test_report_of_a_dynamic_cache_says_to_use_a_static_one(model):
    backend = quest_compile.backend(**SHORT, budget=96, inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(random_prompt(1, 8))
    report = backend.report()
    assert report.count("untouched") == NUM_LAYERS
    assert {row.reason.name for row in report.rows} == {"NOT_A_CACHE"}
    assert "StaticCache" in str(report)


def test_report_of_another_attention_says_to_use_sdpa():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    backend = quest_compile.backend(**SHORT, budget=112, inner="eager")
    decode(torch.compile(model, backend=backend), model, steps=1)
    assert "attn_implementation" in str(backend.report())


def test_report_says_when_torch_may_have_run_out_of_graphs(model):
    torch._dynamo.reset()
    backend = quest_compile.backend(**SHORT, budget=144, inner="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        decode(torch.compile(model, backend=backend), model, steps=1)
        assert "need another one run uncompiled" in str(backend.report())
    assert "need another one" not in str(backend.report())


def test_the_log_shows_the_table(model, caplog):
    with caplog.at_level(logging.INFO, logger="quest_compile"):
        decode(torch.compile(model, backend=quest_compile.backend(inner="eager")), model, steps=1)
    assert "4 attention calls" in caplog.text


_LAYER_PROGRAM = """
import torch, quest_compile

def layer(query, key, key_cache, value_cache, position, mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, key)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key_cache, value_cache, mask, enable_gqa=True)

backend = quest_compile.backend(budget=64, num_dense_layers=0, inner="eager",
                                num_sink_pages=1, num_recent_pages=2)
with torch.no_grad():
    torch.compile(layer, backend=backend)(
        torch.ones(1, 4, 1, 16), torch.ones(1, 2, 1, 16), *torch.zeros(2, 1, 2, 256, 16),
        torch.tensor([200]), torch.ones(1, 1, 1, 256, dtype=torch.bool))
"""


def test_torch_logs_and_the_structured_trace_carry_the_report(tmp_path):
    environment = os.environ | {"TORCH_LOGS": "quest_compile", "TORCH_TRACE": str(tmp_path)}
    program = [sys.executable, "-c", _LAYER_PROGRAM]
    done = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
    assert "1 attention calls: 1 sparse, 0 dense, 0 untouched" in done.stderr
    (trace,) = tmp_path.iterdir()
    assert "quest_compile_report" in trace.read_text()


_SECOND_LAYER = """
    second = quest_compile.backend(budget=80, num_dense_layers=0, inner="eager",
                                   num_sink_pages=1, num_recent_pages=2)
    torch.compile(layer, backend=second)(
        torch.ones(1, 4, 1, 16), torch.ones(1, 2, 1, 16), *torch.zeros(2, 1, 2, 256, 16),
        torch.tensor([200]), torch.ones(1, 1, 1, 256, dtype=torch.bool))
assert quest_compile.ops.counters()["sparse_calls"] == 2
print(backend.report())
"""


def test_without_the_native_library_it_works_and_says_so_once():
    environment = os.environ | {"QUEST_COMPILE_NATIVE": "0"}
    program = [sys.executable, "-c", _LAYER_PROGRAM + _SECOND_LAYER]
    done = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr.count("NativeLibraryWarning") == 1
    assert "torch reference, slow (disabled by QUEST_COMPILE_NATIVE=0)" in done.stdout


def test_gradients_leave_the_model_dense_and_say_so():
    model = tiny_model("llama")
    backend = quest_compile.backend(**SHORT, budget=64, inner="eager")
    decode(torch.compile(model, backend=backend), model, steps=1, grad_mode=torch.enable_grad)
    assert {row.reason.name for row in backend.report().rows} == {"GRADIENTS"}
    assert ops.counters()["sparse_calls"] == 0


class TestStrict:
    def test_passes_when_every_layer_is_as_expected(self, model):
        backend = quest_compile.backend(**SHORT, budget=64, inner="eager", strict=True)
        decode(torch.compile(model, backend=backend), model, steps=1)
        assert backend.report().count("sparse") == NUM_LAYERS - 2

    def test_a_dense_prefill_graph_is_fine(self, model):
        backend = quest_compile.backend(**SHORT, budget=64, inner="eager", strict=True)
        with torch.no_grad():
            cache = prefill(model, random_prompt(1, 8), MAX_SEQ_LEN)
            greedy_step(torch.compile(model, backend=backend), cache, random_prompt(1, 8), 8)

    def test_raises_with_the_table_when_a_layer_is_left(self, model):
        backend = quest_compile.backend(**SHORT, budget=64, inner="eager", strict=True)
        with torch.no_grad(), pytest.raises(Exception, match="strict=True.*4 of 4") as raised:
            torch.compile(model, backend=backend)(random_prompt(1, 8))
        assert "do not come from a static cache" in str(raised.value)

    def test_raises_when_there_is_nothing_to_replace(self):
        backend = quest_compile.backend(strict=True, inner="eager")
        step = torch.compile(torch.nn.Linear(2, 2), backend=backend)
        with torch.no_grad():
            step(torch.ones(1, 2))
            with pytest.raises(Exception, match="strict=True: nothing to replace"):
                step(torch.ones(1, 2))

    def test_raises_when_every_layer_is_a_dense_layer(self, model):
        """At the second step: the first graphs of a model may be those of its dense layers."""
        backend = quest_compile.backend(num_dense_layers=4, strict=True, inner="eager")
        step = torch.compile(model, backend=backend)
        decode(step, model, steps=1)
        with pytest.raises(Exception, match="no layer is sparse"):
            decode(step, model, steps=1)


class TestIdentity:
    def test_equal_settings_give_the_same_object(self):
        assert quest_compile.backend(budget=640) is quest_compile.backend(budget=640)
        assert quest_compile.backend(budget=640) != quest_compile.backend(budget=800)

    def test_copies_are_the_object_itself(self):
        backend = quest_compile.backend(budget=640, inductor_options={"epilogue_fusion": False})
        assert copy.deepcopy(backend) is backend
        assert hash(copy.copy(backend)) == hash(backend)

    def test_pickles_to_the_object_itself(self):
        backend = quest_compile.backend(budget=640)
        assert pickle.loads(pickle.dumps(backend)) is backend

    def test_repr_shows_what_differs_from_the_defaults(self):
        assert repr(quest_compile.backend(budget=640)) == "quest_compile.backend(budget=640)"

    def test_an_equal_backend_does_not_recompile(self, model):
        first = quest_compile.backend(**SHORT, budget=64, inner="eager")
        decode(torch.compile(model, backend=first), model)
        second = quest_compile.QuestBackend(first.config)
        decode(torch.compile(model, backend=second), model)
        assert not second.report().graphs


class TestOptions:
    def test_backend_by_name_with_options(self, model):
        options = SHORT | {"budget": 64, "inner": "aot_eager"}
        decode(torch.compile(model, backend="quest", options=options), model)
        assert quest_compile.backend(**options).report().count("sparse") == 2
        assert ops.counters()["sparse_calls"] == 2 * 3

    def test_options_override_the_object(self, model):
        backend = quest_compile.backend(**SHORT, budget=64, inner="eager")
        decode(torch.compile(model, backend=backend, options={"budget": 128}), model)
        assert backend.report().rows[2].tokens == 128

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_modes_are_accepted(self, model, mode):
        backend = quest_compile.backend(**SHORT, budget=64, inner="aot_eager")
        decode(torch.compile(model, backend=backend, mode=mode), model)
        assert ops.counters()["sparse_calls"] == 2 * 3

    def test_unknown_mode_lists_the_known_ones(self, model):
        with pytest.raises(Exception, match="mode must be one of .*reduce-overhead"):
            quest_compile.backend(inner="eager")(
                torch.fx.symbolic_trace(model.lm_head), [], mode="x"
            )

    def test_unknown_option_lists_the_known_ones(self):
        with pytest.raises(ValueError, match="bugdet .did you mean 'budget'.*known: preset, b"):
            quest_compile.backend(bugdet=64)

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"budget": 0}, ValueError, "expected 1 or more tokens, got 0"),
            ({"budget": -16}, ValueError, "expected 1 or more tokens, got -16"),
            (
                {"budget": 47, "num_sink_pages": 1, "num_recent_pages": 2},
                ValueError,
                "expected room for 1 sink and 2 recent pages, got 2 pages",
            ),
            ({"budget": 2048.0}, ValueError, "expected a share of the context in .0, 1., got 2048"),
            ({"budget": True}, TypeError, "expected an int .tokens. or a float .share., got True"),
            ({"page_size": 12}, ValueError, "expected a multiple of 8 from 8 to 128, got 12"),
            ({"num_dense_layers": -1}, ValueError, "expected 0 or more, got -1"),
            ({"num_sink_pages": "1"}, TypeError, "expected an int, got '1'"),
            ({"num_sink_pages": "1", "budget": 0.5}, TypeError, "expected an int, got '1'"),
            ({"num_recent_pages": 0}, ValueError, "expected 1 or more, got 0"),
            ({"group_reduce": "max"}, ValueError, "expected one of 'softmax', 'none', 'sum'"),
            (
                {"group_reduce": "sum", "summary": "sketch"},
                ValueError,
                "expected 'softmax' or 'none' with summary='sketch', got 'sum'",
            ),
            ({"summary": "int3"}, ValueError, "expected one of 'minmax', 'sketch', got 'int3'"),
            ({"sketch_bits": 3}, ValueError, "expected one of 1, 2, got 3"),
            ({"preset": "papers"}, ValueError, "expected one of 'paper', got 'papers'"),
            ({"inner": "tvm"}, ValueError, "expected one of 'inductor', .*, got 'tvm'"),
            ({"strict": 1}, TypeError, "expected a bool, got 1"),
            ({"inductor_options": 3}, TypeError, "expected a mapping of Inductor settings, got 3"),
        ],
    )
    def test_bad_settings_name_themselves(self, settings, error, message):
        with pytest.raises(error, match=f"^{next(iter(settings))}: {message}"):
            quest_compile.backend(**settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {"page_size": 12},
            {"num_sink_pages": -1},
            {"num_recent_pages": "2"},
            {"group_reduce": "max"},
            {"group_reduce": "sum", "summary": "sketch"},
            {"summary": "int3"},
            {"sketch_bits": 3},
            {"top_p": 1.5},
            {"budget": 16},
        ],
        ids=str,
    )
    def test_an_operator_says_the_same(self, settings):
        caches = torch.zeros(2, 1, 2, 256, 16)
        arguments = (torch.zeros(1, 4, 1, 16), *caches, torch.zeros(1), torch.tensor([200]))
        with pytest.raises((TypeError, ValueError)) as of_backend:
            quest_compile.backend(**settings)
        with pytest.raises(type(of_backend.value), match=f"^{re.escape(str(of_backend.value))}$"):
            ops.sparse_decode(*arguments, **{"budget": 64} | settings)

    def test_page_sizes_are_those_of_the_operators(self):
        scores, seq_lens = torch.zeros(1, 1, 8), torch.tensor([4])
        select = (quest_compile.ops.select_pages, torch.ops.quest.select_pages)
        calls = [lambda size: quest_compile.QuestConfig(page_size=size)]
        calls += [
            lambda size, s=s: s(scores, seq_lens, page_budget=8, page_size=size) for s in select
        ]
        for size in range(-8, 265):
            refused = []
            for call in calls:
                try:
                    call(size)
                except (RuntimeError, ValueError) as error:
                    assert "page_size" in str(error)
                    refused.append(call)
            assert len(refused) in (0, len(calls)), size

    @pytest.mark.parametrize(
        "function", [quest_compile.backend, quest_compile.compile_for_generate]
    )
    def test_signatures_spell_out_the_fields_of_the_config(self, function):
        spelled_out = {
            name: (parameter.annotation, parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        fields = dataclasses.fields(quest_compile.QuestConfig)
        expected = {field.name: (field.type, field.default) for field in fields}
        assert spelled_out.pop("preset")[1] is None
        assert spelled_out == expected
        assert set(QuestSettings.__annotations__) == {"preset", *expected}
        text = pydoc.render_doc(function, renderer=pydoc.plaintext)
        for field in fields:
            assert re.search(rf"\b{field.name}: .+? = {re.escape(repr(field.default))}[,)]", text)
        # What help() shows can be given.
        assert quest_compile.backend(preset=None) is quest_compile.backend()


class TestPreset:
    PAPER = {"summary": "minmax", "group_reduce": "none", "num_sink_pages": 0}
    PAPER |= {"num_recent_pages": 1, "num_dense_layers": 2}

    def test_paper_is_that_of_the_paper(self):
        assert quest_compile.backend(preset="paper") is quest_compile.backend(**self.PAPER)

    @pytest.mark.parametrize(
        "named", [{"num_sink_pages": 3}, {"summary": "sketch"}, {"budget": 80}]
    )
    def test_named_settings_win(self, named):
        made = quest_compile.backend(preset="paper", **named)
        assert made is quest_compile.backend(**self.PAPER | named)

    def test_by_name_with_options(self, model):
        options = {"preset": "paper", "budget": 64, "inner": "eager"}
        decode(torch.compile(model, backend="quest", options=options), model)
        backend = quest_compile.backend(**options)
        assert backend.report().count("sparse") == NUM_LAYERS - 2
        assert ops.counters()["sparse_calls"] == (NUM_LAYERS - 2) * 3

    def test_report_and_repr_show_its_settings(self, model):
        backend = quest_compile.backend(preset="paper", budget=64, inner="eager")
        decode(torch.compile(model, backend=backend), model, steps=1)
        expected = (
            "budget 64, page_size 16, summary minmax, group_reduce none, num_sink_pages 0, "
            "num_recent_pages 1, inner eager"
        )
        assert expected in str(backend.report()).splitlines()
        (graph,) = backend.report().as_dict()["graphs"]
        assert self.PAPER.items() <= graph["config"].items()
        assert "preset" not in repr(backend)
        assert eval(repr(backend), {"quest_compile": quest_compile}) is backend

    def test_compile_for_generate_takes_it(self):
        model = tiny_model("llama")
        settings = {"preset": "paper", "budget": 64, "inner": "eager"}
        quest_compile.compile_for_generate(model, **settings)
        model.generate(random_prompt(1, LENGTH), max_new_tokens=3, min_new_tokens=3)
        graphs = quest_compile.backend(**settings).report().graphs
        assert [graph.count("sparse") for graph in graphs if graph.is_decode] == [NUM_LAYERS - 2]

    def test_explain_takes_it(self, model):
        report = quest_compile.explain(model, preset="paper", budget=64)
        assert "group_reduce none" in str(report)


class TestExplain:
    def test_a_model_alone_is_traced_for_a_decode_step(self, model):
        report = quest_compile.explain(model, quest=quest_compile.QuestConfig(**SHORT, budget=64))
        assert [report.count(t) for t in ("sparse", "dense", "untouched")] == [2, 2, 0]

    def test_a_call_is_traced_as_it_is(self, model):
        report = quest_compile.explain(model, random_prompt(1, 8))
        assert report.count("untouched") == NUM_LAYERS

    def test_settings_may_be_given_by_name(self, model):
        report = quest_compile.explain(model, **FEW_PAGES, budget=64, num_dense_layers=0)
        assert report.count("sparse") == 4
        assert report.rows[0].tokens == 64

    def test_something_else_alone_is_a_clear_error(self):
        with pytest.raises(TypeError, match="needs a transformers model"):
            quest_compile.explain(torch.nn.Linear(2, 2))


def test_compile_for_generate_wants_a_model_that_generates():
    with pytest.raises(TypeError, match="model must be a transformers model"):
        quest_compile.compile_for_generate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("settings", [{"bugdet": 64}, {"budget": 0}])
def test_compile_for_generate_refuses_bad_settings_before_it_changes_the_model(settings):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="budget"):
        quest_compile.compile_for_generate(model, **settings)
    assert model.generation_config.compile_config is None
    assert model.generation_config.cache_implementation is None


def test_compile_for_generate_warns_of_an_attention_it_cannot_replace():
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quest_compile.compile_for_generate(model)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match='attn_implementation is not "sdpa".*set_attn_impl'):
        quest_compile.compile_for_generate(model)
