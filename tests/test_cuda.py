"""The main job on a GPU; skipped where there is none."""

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile.decoding import greedy_step, prefill

pytestmark = pytest.mark.cuda

LENGTH, MAX_SEQ_LEN, STEPS = 300, 1024, 20


def decode(step, model):
    prompt = random_prompt(1, LENGTH).to(model.device)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        token, tokens = prompt[:, -1:], []
        for i in range(STEPS):
            token = greedy_step(step, cache, token, LENGTH - 1 + i)
            tokens.append(int(token))
    return tokens


@pytest.mark.parametrize(
    ("inner", "mode"),
    [("aot_eager", None), ("inductor", None), ("inductor", "reduce-overhead")],
)
def test_budget_that_covers_the_context_gives_dense_tokens(inner, mode):
    torch._dynamo.reset()
    model = tiny_model("llama").to("cuda")
    backend = quest_compile.backend(**SHORT, budget=512, inner=inner)
    step = torch.compile(model, backend=backend, mode=mode)
    assert decode(step, model) == decode(model, model)
    assert backend.report().count("sparse") == 2


def test_a_small_budget_gives_the_tokens_of_the_cpu():
    tokens = []
    for device in ("cuda", "cpu"):
        torch._dynamo.reset()
        model = tiny_model("llama").to(device)
        backend = quest_compile.backend(**SHORT, budget=64, inner="aot_eager")
        tokens.append(decode(torch.compile(model, backend=backend), model))
    assert tokens[0] == tokens[1]
