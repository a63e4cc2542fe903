"""Compilation on bad days: lengths that change, resets, graph breaks, export, failing graphs."""

import io
import os
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import SHORT, random_prompt, tiny_model
from torch._dynamo.utils import counters

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill

LENGTH, MAX_SEQ_LEN, NUM_STEPS = 200, 512, 4
NUM_LAYERS = 3
LAYERS = [(0, "dense"), (1, "dense"), (2, "sparse")]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    ops.reset_counters()


@pytest.fixture
def backend():
    """256 tokens cover what the tests decode: tokens equal dense ones on the sparse path."""
    return quest_compile.QuestBackend(
        quest_compile.QuestConfig(**SHORT, budget=256, inner="aot_eager")
    )


def num_graphs():
    return counters["stats"]["unique_graphs"]


def decode(step, model, *, batch=1, length=LENGTH, max_seq_len=MAX_SEQ_LEN):
    """Greedy tokens of NUM_STEPS steps after an eager prefill."""
    prompt = random_prompt(batch, length)
    cache = prefill(model, prompt[:, :-1], max_seq_len)
    return continue_decoding(step, cache, prompt[:, -1:], length - 1)


def continue_decoding(step, cache, token, position):
    tokens = []
    with torch.no_grad():
        for i in range(NUM_STEPS):
            token = greedy_step(step, cache, token, position + i)
            tokens.append(token)
    return torch.cat(tokens, 1).tolist()


def layers_by_graph(backend):
    return [
        [(row.layer, row.treatment.value) for row in graph.rows]
        for graph in backend.report().graphs
        if graph.rows
    ]


class TestRecompiles:
    def test_two_cache_lengths_give_at_most_one_more_graph(self, model, backend):
        step = torch.compile(model, backend=backend)
        for max_seq_len in (512, 777, 400, 1024, 512):
            assert decode(step, model, max_seq_len=max_seq_len) == decode(model, model)
        assert num_graphs() == len(backend.report().graphs) == 2
        assert ops.counters()["sparse_calls_covered"] == (NUM_LAYERS - 2) * NUM_STEPS * 5

    def test_prompt_lengths_give_no_more_graphs(self, model, backend):
        step = torch.compile(model, backend=backend)
        for length in (200, 16, 17, 250):
            decode(step, model, length=length)
        assert num_graphs() == 1

    def test_many_batch_sizes_give_two_graphs(self, model, backend):
        """One for the first size and one for all others; size 1 is always one of its own."""
        step = torch.compile(model, backend=backend)
        for batch in (2, 5, 3):
            assert decode(step, model, batch=batch) == decode(model, model, batch=batch)
        assert num_graphs() == 2
        decode(step, model, batch=1)
        assert num_graphs() == 3

    def test_prompts_compiled_in_many_lengths_give_two_graphs(self, model, backend):
        step = torch.compile(model, backend=backend)
        cache = prefill(model, random_prompt(1, 1), MAX_SEQ_LEN)
        with torch.no_grad():
            for length in (20, 33, 57, 100):
                cache.reset()
                greedy_step(step, cache, random_prompt(1, length), 0)
        assert num_graphs() == 2

    def test_dynamic_from_the_start_gives_one_graph(self, model, backend):
        step = torch.compile(model, backend=backend, dynamic=True)
        for max_seq_len in (512, 777):
            assert decode(step, model, max_seq_len=max_seq_len) == decode(model, model)
        assert num_graphs() == 1
        assert ops.counters()["sparse_calls_covered"] == (NUM_LAYERS - 2) * NUM_STEPS * 2


def test_caches_continue_after_a_reset_of_dynamo(model, backend):
    step = torch.compile(model, backend=backend)
    prompt = random_prompt(1, LENGTH)
    caches = [prefill(model, prompt[:, :-1], MAX_SEQ_LEN) for _ in range(2)]
    tokens = []
    for compiled, cache in zip((model, step), caches):
        before = continue_decoding(compiled, cache, prompt[:, -1:], LENGTH - 1)
        torch._dynamo.reset()
        last = torch.tensor([before[0][-1:]])
        after = continue_decoding(compiled, cache, last, LENGTH - 1 + NUM_STEPS)
        tokens.append((before, after))
    assert tokens[0] == tokens[1]
    assert num_graphs() == 2
    assert ops.counters()["sparse_calls_covered"] == (NUM_LAYERS - 2) * NUM_STEPS * 2
    assert ops.counters()["summaries_rebuilt"] == 0


def test_fullgraph_works(model, backend):
    step = torch.compile(model, backend=backend, fullgraph=True)
    assert decode(step, model) == decode(model, model)
    assert ops.counters()["sparse_calls_covered"] == (NUM_LAYERS - 2) * NUM_STEPS


class TestGraphBreaks:
    def test_around_the_model(self, model, backend):
        def user_code(**inputs):
            torch._dynamo.graph_break()
            out = model(**inputs)
            torch._dynamo.graph_break()
            out.logits = out.logits * 2
            return out

        assert decode(torch.compile(user_code, backend=backend), model) == decode(model, model)
        assert layers_by_graph(backend) == [LAYERS]

    @pytest.mark.parametrize("broken_layer", [0, 1])
    def test_inside_a_layer_keep_the_layer_numbers(self, backend, broken_layer):
        """A graph that starts in the middle of the model must not take its layers for the first."""
        model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
        expected = decode(model, model)
        projection = model.model.layers[broken_layer].self_attn.o_proj
        forward = projection.forward

        def broken(x):
            torch._dynamo.graph_break()
            return forward(x)

        projection.forward = broken
        assert decode(torch.compile(model, backend=backend), model) == expected
        graphs = layers_by_graph(backend)
        assert max(map(len, graphs)) < NUM_LAYERS
        assert {layer for graph in graphs for layer in graph} == set(LAYERS)
        assert ops.counters()["sparse_calls_covered"] == (NUM_LAYERS - 2) * NUM_STEPS

    def test_inside_attention_between_write_and_read_say_why(self, backend):
        """Where the write is in another graph, nothing can keep the page summaries right."""

        def layer(query, key, key_cache, value_cache, position, mask):
            key_cache.index_copy_(2, position, key)
            value_cache.index_copy_(2, position, key)
            torch._dynamo.graph_break()
            return torch.nn.functional.scaled_dot_product_attention(
                query, key_cache, value_cache, mask
            )

        inputs = _layer_inputs()
        with torch.no_grad():
            out = torch.compile(layer, backend=backend)(*inputs)
            torch.testing.assert_close(out, layer(*inputs))
        assert [row.reason.name for row in backend.report().rows] == ["NO_CACHE_WRITE"]


def _layer_inputs(max_seq_len=512, position=300):
    query, key = torch.randn(2, 1, 4, 1, 16)
    caches = torch.randn(2, 1, 4, max_seq_len, 16)
    mask = (torch.arange(max_seq_len) <= position)[None, None, None]
    return query, key, *caches, torch.tensor([position]), mask


class TestExport:
    def test_operators_are_exported_saved_and_loaded(self):
        class Attention(torch.nn.Module):
            def forward(self, query, key_cache, value_cache, seq_lens):
                summary = ops.build_page_summary(key_cache, seq_lens)
                return torch.ops.quest.sparse_decode(
                    query, key_cache, value_cache, summary, seq_lens, budget=64
                )

        query, _, *caches, position, _ = _layer_inputs()
        arguments = (query, *caches, position + 1)
        exported = torch.export.export(Attention(), arguments)
        targets = {node.target for node in exported.graph.nodes}
        assert torch.ops.quest.sparse_decode.default in targets
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        ops.reset_counters()
        out = torch.export.load(file).module()(*arguments)
        assert ops.counters()["sparse_calls"] == 1
        assert torch.equal(out, Attention()(*arguments))

    def test_export_runs_no_backend_and_stays_dense(self, backend):
        """torch.export takes the module inside, as it is."""

        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("caches", torch.randn(2, 1, 4, 512, 16))

            def forward(self, query, key, position, mask):
                self.caches.index_copy_(3, position, torch.stack([key, key]))
                return torch.nn.functional.scaled_dot_product_attention(
                    query, self.caches[0], self.caches[1], mask
                )

        query, key, _, _, position, mask = _layer_inputs()
        compiled = torch.compile(Layer(), backend=backend)
        with torch.no_grad():
            exported = torch.export.export(compiled, (query, key, position, mask))
        names = {str(node.target) for node in exported.graph.nodes}
        assert "aten.scaled_dot_product_attention.default" in names
        assert not any("quest" in name for name in names)
        assert "no graph was compiled" in str(backend.report())


def test_an_error_inside_the_inner_compiler_names_the_backend_and_the_cause(model):
    backend = quest_compile.backend(**SHORT, budget=64, inductor_options={"no_such_option": 1})
    with pytest.raises(Exception, match="quest_compile.backend.*no_such_option") as raised:
        decode(torch.compile(model, backend=backend), model)
    assert "no_such_option" in str(raised.value)


def test_an_unknown_option_by_name_is_hinted_at(model):
    step = torch.compile(model, backend="quest", options={"bugdet": 64})
    with pytest.raises(Exception, match="did you mean 'budget'"):
        decode(step, model)


_MODEL_PROGRAM = """
import sys, torch, transformers, quest_compile
sys.path.insert(0, {tests!r})
from tiny_models import FEW_PAGES, random_prompt, tiny_model
from torch._dynamo.utils import counters

model = tiny_model("llama", num_hidden_layers=1)
quest_compile.compile_for_generate(model, **FEW_PAGES, budget=64, num_dense_layers=0)
quest_compile.warmup(model, 256)
tokens = model.generate(random_prompt(1, 200), max_new_tokens=4, do_sample=False)[0, 200:].tolist()
assert quest_compile.ops.counters()["sparse_calls"] > 0
print(*(counters["aot_autograd"]["autograd_cache_" + s] for s in ("hit", "miss")),
      *(counters["inductor"]["fxgraph_cache_" + s] for s in ("hit", "miss")), tokens)
"""


@pytest.mark.nightly
@pytest.mark.inductor
def test_a_model_compiled_by_one_process_is_loaded_by_the_next(tmp_path):
    program = _MODEL_PROGRAM.format(tests=os.path.dirname(__file__))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment, check=True, capture_output=True, text=True,
        ).stdout.split(maxsplit=4)
        for _ in range(2)
    )  # fmt: skip
    assert first[:4] == ["0", "1", "0", "1"]
    assert second[:4] == ["1", "0", "1", "0"]
    assert first[4] == second[4]


def test_model_and_compiled_model_share_one_static_cache(model, backend):
    """Dense and sparse steps in turn: what the other wrote is noticed."""
    step = torch.compile(model, backend=backend)
    cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
        token, tokens = prompt[:, -1:], []
        for i in range(NUM_STEPS):
            token = greedy_step((model, step)[i % 2], cache, token, LENGTH - 1 + i)
            tokens.append(int(token))
    assert [tokens] == decode(model, model)
    assert ops.counters()["sparse_calls_covered"] == (NUM_LAYERS - 2) * NUM_STEPS // 2
