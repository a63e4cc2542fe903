"""Layers that are compiled one by one are numbered, checked and reported as layers of a model."""

import pytest
import torch
from test_buffer_caches import NUM_NEW_TOKENS, Transformer
from test_buffer_caches import decode as decode_buffers
from tiny_models import FEW_PAGES, random_prompt, tiny_model

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig
from quest_compile.decoding import greedy_step, prefill

NUM_LAYERS, NUM_STEPS, LENGTH, MAX_SEQ_LEN = 4, 3, 200, 512


def compile_in_place(model, backend):
    for layer in model.model.layers:
        layer.compile(backend=backend)


def compile_attention(model, backend):
    for layer in model.model.layers:
        layer.self_attn.compile(backend=backend)


def wrap(model, backend):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend=backend)


class Pair(torch.nn.Module):
    """Two layers, for one graph."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, **kwargs):
        return self.second(self.first(x, **kwargs), **kwargs)


def compile_pairs(model, backend):
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(map(Pair, layers[::2], layers[1::2]))
    compile_in_place(model, backend)


def by_accelerate(model, backend):
    from accelerate.utils import compile_regions

    model.model = compile_regions(model.model, backend=backend)


WAYS = [compile_in_place, compile_attention, wrap, compile_pairs, by_accelerate]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def backend_of(**settings):
    return QuestBackend(QuestConfig(**FEW_PAGES | {"inner": "eager"} | settings))


def decode(model, step=None):
    """``step``: the model, where it was compiled as a whole."""
    step = model if step is None else step
    prompt = random_prompt(1, LENGTH)
    with torch.compiler.set_stance("force_eager"):
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    token, tokens = prompt[:, -1:], []
    with torch.no_grad():
        for i in range(NUM_STEPS):
            token = greedy_step(step, cache, token, LENGTH - 1 + i)
            tokens.append(int(token))
    return tokens


@pytest.mark.parametrize("way", WAYS)
def test_layers_keep_their_numbers_and_strict_is_content(way):
    model = tiny_model("llama")
    expected = decode(model)
    backend = backend_of(num_dense_layers=2, budget={2: 256, 3: 240}, strict=True)
    way(model, backend)
    assert decode(model) == expected
    rows = {row.layer: row for row in backend.report().rows}
    assert [rows[i].treatment.value for i in range(NUM_LAYERS)] == ["dense"] * 2 + ["sparse"] * 2
    assert [rows[i].tokens for i in (2, 3)] == [256, 240]
    assert ops.counters()["sparse_calls_covered"] == 2 * NUM_STEPS
    assert backend.report().uncompiled == ()


def test_layers_over_the_limit_of_graphs_are_in_the_report():
    model, backend = tiny_model("llama"), backend_of(num_dense_layers=0, budget=64)
    compile_in_place(model, backend)
    with torch._dynamo.config.patch(recompile_limit=3):
        decode(model)
    report = backend.report()
    assert ops.counters()["sparse_calls"] == 3 * NUM_STEPS
    assert (
        report.uncompiled
        == ("forward (modeling_llama.py)",)
        == tuple(report.as_dict()["uncompiled"])
    )
    assert "calls that fit none of its 3 graphs run uncompiled" in str(report)


def test_strict_names_the_function_with_layers_that_run_uncompiled():
    model, backend = tiny_model("llama"), backend_of(num_dense_layers=0, budget=64, strict=True)
    compile_in_place(model, backend)
    with torch._dynamo.config.patch(recompile_limit=3):
        with pytest.raises(Exception, match=r"strict=True: forward \(modeling_llama.py\) has more"):
            decode(model)


def test_strict_notices_a_function_that_is_given_up_later():
    model, backend = tiny_model("llama"), backend_of(num_dense_layers=0, budget=64, strict=True)
    step = torch.compile(model, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=1):
        decode(model, step)
        other = tiny_model("llama").bfloat16()
        decode(other, torch.compile(other, backend=backend))
        with pytest.raises(Exception, match="strict=True: .* has more layers or shapes"):
            decode(model, step)


def test_what_was_given_up_is_remembered_over_many_compilations():
    model, backend = tiny_model("llama"), backend_of(num_dense_layers=0, budget=64)
    compile_in_place(model, backend)
    with torch._dynamo.config.patch(recompile_limit=3):
        decode(model)
    for number in range(70):
        exec(f"def other(x): return x + {number}", names := {})
        torch.compile(names["other"], backend="eager")(torch.ones(2))
    assert backend.report().uncompiled == ("forward (modeling_llama.py)",)


def test_a_function_that_has_just_enough_graphs_is_not_called_uncompiled():
    model, backend = tiny_model("llama"), backend_of(num_dense_layers=0, budget=64, strict=True)
    compile_in_place(model, backend)
    with torch._dynamo.config.patch(recompile_limit=NUM_LAYERS):
        decode(model)
        assert "need another one" in str(backend.report())
    assert ops.counters()["sparse_calls"] == NUM_LAYERS * NUM_STEPS
    assert backend.report().uncompiled == ()


class TestOneGraphForAllLayers:
    """Caches that are buffers of their layer: torch runs all layers by one graph."""

    def run(self, **settings):
        torch.manual_seed(0)
        model, backend = Transformer("setitem", "enable_gqa").eval(), backend_of(**settings)
        expected = decode_buffers(model, model)
        for layer in model.layers:
            layer.compile(backend=backend)
        ops.reset_counters()
        out = decode_buffers(model, model)
        is_equal = (out - expected).abs().max() <= 1e-4 * expected.abs().max()
        return bool(is_equal), backend.report()

    def test_is_sparse_where_no_setting_tells_layers_apart(self):
        is_equal, report = self.run(num_dense_layers=0, budget=48, strict=True)
        assert [(row.layer, row.tokens) for row in report.rows][-1:] == [(None, 48)]
        assert ops.counters()["sparse_calls"] == NUM_LAYERS * (NUM_NEW_TOKENS - 1)
        assert not is_equal, "the budget is seen in the logits"

    @pytest.mark.parametrize(
        "settings",
        [
            {"num_dense_layers": 2, "budget": 48},
            {"num_dense_layers": 0, "budget": {3: 48}},
            {"num_dense_layers": 0, "budget": lambda layer: 48 + 16 * layer},
        ],
        ids=["num_dense_layers", "mapping", "function"],
    )
    def test_is_dense_and_says_why_where_one_does(self, settings):
        is_equal, report = self.run(**settings)
        assert is_equal
        assert (report.rows[-1].layer, report.rows[-1].reason.name) == (None, "UNKNOWN_LAYER")
        assert "?      dense" in str(report)
        assert "num_dense_layers=0 and one budget for all" in str(report)
        assert ops.counters()["sparse_calls"] == 0
        with pytest.raises(Exception, match="strict=True: 1 of 1"):
            torch._dynamo.reset()
            self.run(**settings, strict=True)
