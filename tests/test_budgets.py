"""Budgets of layers and shares of the context: settings, what the report says, what is read."""

import json
import pickle

import pytest
import torch
from tiny_models import FEW_PAGES, NUM_LAYERS, SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import QuestConfig, ops
from quest_compile.budgets import DEFAULT_BUDGET
from quest_compile.decoding import greedy_step, prefill

LENGTH, MAX_SEQ_LEN = 300, 512


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def run(model, max_seq_len=MAX_SEQ_LEN, length=LENGTH, **settings):
    """The report of two steps; counters are those of the second."""
    backend = quest_compile.backend(**FEW_PAGES, inner="eager", num_dense_layers=1, **settings)
    backend.reset()
    step = torch.compile(model, backend=backend)
    with torch.no_grad():
        cache = prefill(model, random_prompt(1, length), max_seq_len)
        token = greedy_step(step, cache, torch.zeros(1, 1, dtype=torch.int64), length)
        ops.reset_counters()
        greedy_step(step, cache, token, length + 1)
    (graph,) = backend.report().graphs
    return graph


def rows_of(graph):
    return [(row.treatment.value, row.tokens) for row in graph.rows]


def test_layers_have_budgets_of_their_own(model):
    graph = run(model, budget={1: 64, 2: 0.25, "default": 96})
    assert rows_of(graph) == [("dense", 512), ("sparse", 64), ("sparse", 128), ("sparse", 96)]
    # The open page has 302 % 16 = 14 tokens, and a quarter of 19 pages is 5.
    assert ops.counters()["tokens_attended"] == 4 * (64 - 2 + 80 - 2 + 96 - 2)


def test_a_function_of_the_layer(model):
    graph = run(model, budget=lambda layer: 64 if layer < 3 else 2048)
    assert rows_of(graph) == [("dense", 512), ("sparse", 64), ("sparse", 64), ("dense", 512)]
    assert graph.rows[3].reason.name == "BUDGET_COVERS_CACHE"
    assert "budget of each layer" in graph_text(graph)


def graph_text(graph):
    return str(quest_compile.report().__class__([graph]))


def test_layers_that_are_not_named_have_the_default(model):
    graph = run(model, budget={2: 64})
    assert rows_of(graph) == [("dense", 512)] * 2 + [("sparse", 64), ("dense", 512)]


def test_a_layer_that_is_not_there_is_said(model):
    said = "budget: there is no layer 99, only 0 to 3"
    graph = run(model, budget={2: 64, 99: 64})
    assert said in graph_text(graph)
    assert "there is no layer" not in graph_text(run(model, budget={2: 64, 3: 64}))
    with pytest.raises(Exception, match=f"strict=True: {said}"):
        run(model, budget={"default": 64, 99: 64}, strict=True)
    run(model, budget={"default": 64, 3: 64}, strict=True)


def test_a_share_grows_with_the_context(model):
    attended = []
    for length in (100, 200, 400):
        torch._dynamo.reset()
        graph = run(model, length=length, budget=0.2)
        assert rows_of(graph)[1:] == [("sparse", 112)] * 3
        attended.append(ops.counters()["max_tokens_attended"])
    assert attended == [64 - 10, 64 - 6, 96 - 14]


def test_a_share_that_covers_the_cache_is_dense(model):
    graph = run(model, max_seq_len=64, length=40, budget=0.9)
    assert rows_of(graph) == [("dense", 64)] * NUM_LAYERS
    graph = run(model, max_seq_len=128, length=40, budget=0.9)
    assert rows_of(graph)[1:] == [("sparse", 128 - 16 + 16)] * 3 or rows_of(graph)[1][0] == "dense"


def test_mappings_are_equal_by_value_and_stay_readable():
    a, b = (
        QuestConfig(budget={3: 640, "default": 0.5}),
        QuestConfig(budget={"default": 0.5, 3: 640}),
    )
    assert a == b and hash(a) == hash(b) and a != QuestConfig(budget={3: 640})
    backends = [quest_compile.backend(budget=x) for x in ({3: 640}, {3: 640}, {3: 800})]
    assert backends[0] is backends[1] and backends[0] is not backends[2]
    assert a.as_dict()["budget"] == {3: 640, "default": 0.5}
    assert json.loads(json.dumps(a.as_dict()))["budget"] == {"3": 640, "default": 0.5}
    assert QuestConfig.from_options(a.as_dict()) == a
    assert pickle.loads(pickle.dumps(backends[0])) is backends[0]
    assert repr(backends[0]) == "quest_compile.backend(budget={3: 640})"


def test_what_a_layer_gets():
    config = QuestConfig(**FEW_PAGES, budget={0: 100, 1: 0.1, 2: 0.001}, page_size=16)
    assert config.layer_budget(0, 4096).pages == 6
    assert (config.layer_budget(1, 4000).pages, config.layer_budget(1, 4000).fraction) == (25, 0.1)
    assert config.layer_budget(2, 4000).pages == 4
    assert config.layer_budget(7, 10**6).tokens == DEFAULT_BUDGET
    with pytest.raises(TypeError, match="page_budget"):
        _ = config.page_budget


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ("64", TypeError),
        (None, TypeError),
        (True, TypeError),
        (0, ValueError),
        (-0.5, ValueError),
        (1.0, ValueError),
        (2048.0, ValueError),
        (float("nan"), ValueError),
        (47, ValueError),
        ({2: 47}, ValueError),
        ({2: 1.5}, ValueError),
        ({2: "64"}, TypeError),
        ({-1: 64}, ValueError),
        ({"first": 64}, TypeError),
        ({1.0: 64}, TypeError),
    ],
    ids=str,
)
def test_what_is_no_budget_is_an_error(budget, error):
    with pytest.raises(error, match="budget"):
        QuestConfig(**FEW_PAGES, budget=budget)


def test_a_function_that_gives_no_budget_is_an_error(model):
    config = QuestConfig(**FEW_PAGES, budget=lambda layer: 16 * layer)
    for layer in (0, 2):
        with pytest.raises(ValueError, match="budget"):
            config.layer_budget(layer, 512)
    with pytest.raises(Exception, match=r"budget\(0\): expected an int"):
        run(model, budget=lambda layer: None)


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}],
    ids=str,
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        QuestConfig(**settings)
    with pytest.raises(TypeError, match="top_p"):
        QuestConfig(top_p="0.9")


def test_top_p_reads_less(model):
    run(model, budget=128)
    most = ops.counters()["tokens_attended"]
    torch._dynamo.reset()
    run(model, budget=128, top_p=0.05)
    assert 0 < ops.counters()["tokens_attended"] < most


def test_explain_takes_every_kind_of_budget(model):
    for budget in (0.1, {2: 64, "default": 0.1}, lambda layer: 64):
        report = quest_compile.explain(model, **SHORT, budget=budget)
        assert report.count("sparse") == 2
