"""Linear layers of models: replaced however these are compiled, and the tokens are the same."""

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig
from quest_compile.decoding import greedy_step, prefill

NUM_STEPS, LENGTH, MAX_SEQ_LEN = 4, 200, 512
# Layers of the tiny llama: q, k, v, o, gate, up, down in each of 4, and the head.
NUM_LINEAR = 7 * 4 + 1


@pytest.fixture(autouse=True)
def _fresh(serves_natively):
    if not serves_natively:
        pytest.skip("without kernels all is left to torch")
    torch._dynamo.reset()


@torch.no_grad()
def decode(model, step, batch=1):
    """Tokens of NUM_STEPS after a prompt, and counters of those steps."""
    prompt = random_prompt(batch, LENGTH)
    cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    token, tokens = prompt[:, -1:], []
    ops.reset_counters()
    for i in range(NUM_STEPS):
        token = greedy_step(step, cache, token, LENGTH - 1 + i)
        tokens.append(token.flatten().tolist())
    return tokens, ops.counters()


def backend_of(inner="eager", budget=1024, **settings):
    return QuestBackend(QuestConfig(**SHORT, budget=budget, inner=inner, **settings))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "mixtral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_the_model(family, batch):
    model = tiny_model(family)
    expected, counted = decode(model, model, batch)
    assert counted["linear_calls"] == 0
    backend = backend_of()
    tokens, counted = decode(model, torch.compile(model, backend=backend), batch)
    assert tokens == expected
    (graph,) = backend.report().graphs
    assert counted["linear_calls"] == NUM_STEPS * graph.linear.num_replaced > 0
    assert counted["weight_bytes_read"] == NUM_STEPS * graph.linear.weight_bytes


@pytest.mark.inductor
def test_inductor_calls_the_operator():
    model = tiny_model("llama")
    expected, _ = decode(model, model)
    tokens, counted = decode(model, torch.compile(model, backend=backend_of("inductor")))
    assert tokens == expected
    assert counted["linear_calls"] == NUM_STEPS * NUM_LINEAR


def test_through_generate():
    model = tiny_model("llama")
    prompt = random_prompt(1, LENGTH)
    settings = {"max_new_tokens": NUM_STEPS, "do_sample": False}
    expected = model.generate(prompt, **settings)
    quest_compile.compile_for_generate(model, **SHORT, budget=1024, inner="eager")
    ops.reset_counters()
    assert torch.equal(model.generate(prompt, **settings), expected)
    # The first token is that of the prompt.
    assert ops.counters()["linear_calls"] >= (NUM_STEPS - 1) * NUM_LINEAR


def test_layers_compiled_one_by_one():
    model = tiny_model("llama")
    expected, _ = decode(model, model)
    for layer in model.model.layers:
        layer.compile(backend=backend_of())
    tokens, counted = decode(model, model)
    assert tokens == expected
    assert counted["linear_calls"] == NUM_STEPS * 7 * 4


def test_the_setting_leaves_them_to_torch():
    model = tiny_model("llama")
    backend = backend_of(linear="torch")
    _, counted = decode(model, torch.compile(model, backend=backend))
    assert counted["linear_calls"] == 0 and counted["dense_calls"] > 0
    text = str(backend.report())
    assert "linear layers" not in text and ", linear torch" in text


def test_the_report_says_how_many_and_why_others_are_not():
    model = tiny_model("llama")
    model.lm_head.double().register_forward_pre_hook(lambda module, args: (args[0].double(),))
    backend = backend_of(budget=64, strict=True)
    decode(model, torch.compile(model, backend=backend))
    (graph,) = backend.report().graphs
    size = sum(x.nbytes for x in model.parameters() if x.ndim == 2 and x.dtype == torch.float32)
    size -= model.model.embed_tokens.weight.nbytes
    assert (graph.linear.num_replaced, graph.linear.weight_bytes) == (NUM_LINEAR - 1, size)
    assert (
        f"linear layers: {NUM_LINEAR - 1} quest::linear_decode, {size / 1e6:.1f} MB of weights per "
        "step; 1 left to torch: dtype is not float32, bfloat16 or float16"
    ) in str(backend.report())
    assert backend.report().as_dict()["graphs"][0]["linear"]["left"] == {"DTYPE": 1}


def test_weights_that_are_replaced_or_written_are_read_as_they_are_then():
    model = tiny_model("llama")
    step = torch.compile(model, backend=backend_of())
    decode(model, step)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(96, 64))
    expected, _ = decode(model, model)
    tokens, counted = decode(model, step)
    assert tokens == expected and counted["linear_calls"] == NUM_STEPS * NUM_LINEAR


def test_an_unknown_value_is_named():
    with pytest.raises(ValueError, match="linear: expected one of 'auto', 'torch', got 'quest'"):
        QuestConfig(linear="quest")
