"""A few tokens at once, drafts to verify or a short question, take the sparse path.

Every query selects pages of its own, so the tokens are those of decoding one by one.
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import left_padded_prompt, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill, rewind, step_inputs

LENGTH, MAX_SEQ_LEN, NUM_LAYERS = 150, 256, 4
SETTINGS = {"budget": 64, "num_dense_layers": 1, "num_recent_pages": 2}
SETTINGS |= {"group_reduce": "none", "inner": "aot_eager"}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def step(model):
    torch._dynamo.reset()
    return torch.compile(model, backend=quest_compile.backend(**SETTINGS, num_sink_pages=1))


def one_by_one(step, model, prompt, tokens):
    """Logits [B, n, V] of feeding ``tokens`` [B, n] after the prompt, each in a step of its own."""
    cache = prefill(model, prompt, MAX_SEQ_LEN)
    logits = [
        step(**step_inputs(cache, tokens[:, i : i + 1], prompt.shape[1] + i)).logits
        for i in range(tokens.shape[1])
    ]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("length", [LENGTH, 160, 157])
@pytest.mark.parametrize("num_queries", [2, 5, 8])
@torch.no_grad()
def test_logits_are_those_of_single_steps(model, step, length, num_queries):
    prompt, tokens = random_prompt(2, length), random_prompt(2, num_queries, seed=4)
    expected = one_by_one(step, model, prompt, tokens)
    ops.reset_counters()
    cache = prefill(model, prompt, MAX_SEQ_LEN)
    logits = step(**step_inputs(cache, tokens, length)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert ops.counters()["sparse_calls"] == NUM_LAYERS - 1
    assert ops.counters()["sparse_rows"] == (NUM_LAYERS - 1) * 2 * num_queries * 4
    assert ops.counters()["max_tokens_attended"] <= 64


@torch.no_grad()
def test_queries_of_left_padded_rows(model, step):
    prompt, padding = left_padded_prompt([LENGTH, 90, 13])
    tokens = random_prompt(3, 5, seed=4)

    def feed(cache, start, end):
        mask = torch.nn.functional.pad(padding, (0, end), value=1)
        positions = (mask.cumsum(-1) - 1)[:, LENGTH + start :]
        inputs = step_inputs(cache, tokens[:, start:end], LENGTH + start)
        return step(**inputs, attention_mask=mask, position_ids=positions).logits

    def prefilled():
        cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        model(**step_inputs(cache, prompt, 0), attention_mask=padding, position_ids=positions)
        return cache

    cache = prefilled()
    expected = torch.cat([feed(cache, i, i + 1) for i in range(5)], 1)
    ops.reset_counters()
    torch.testing.assert_close(feed(prefilled(), 0, 5), expected, rtol=1e-4, atol=1e-4)
    assert ops.counters()["sparse_calls"] == NUM_LAYERS - 1


@pytest.mark.parametrize("num_right", [0, 1, 3, 5])
@torch.no_grad()
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(model, step, num_right):
    """Five drafts a round, of which ``num_right`` are right; the others are rolled back."""
    prompt = random_prompt(1, LENGTH)
    plain = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    expected, token = [], prompt[:, -1:]
    for i in range(48):
        token = greedy_step(step, plain, token, LENGTH - 1 + i)
        expected.append(int(token))

    ops.reset_counters()
    cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
    found, last = [], int(prompt[0, -1])
    while len(found) < 40:
        position = LENGTH - 1 + len(found)
        drafts = expected[len(found) : len(found) + 5]
        drafts[num_right:] = [(token + 1) % 250 + 1 for token in drafts[num_right:]]
        tokens = torch.tensor([[last, *drafts]])
        choices = step(**step_inputs(cache, tokens, position)).logits.argmax(-1)[0].tolist()
        accepted = 0
        while accepted < 5 and choices[accepted] == drafts[accepted]:
            accepted += 1
        found += choices[: accepted + 1]
        last = found[-1]
        rewind(cache, position + accepted + 1)
    assert found == expected[: len(found)]
    counted = ops.counters()
    assert counted["sparse_calls"] > 0
    assert counted["sparse_calls_covered"] == 0
    assert counted["summaries_rebuilt"] == 0


@torch.no_grad()
def test_few_and_many_queries_are_one_graph_each(model):
    torch._dynamo.reset()
    backend = quest_compile.backend(**SETTINGS, num_sink_pages=2)
    step = torch.compile(model, backend=backend)
    prompt = random_prompt(1, LENGTH)
    for num_queries in (1, 3, 5, 7, 2, 8, 20, 30, 9, 4, 1):
        cache = prefill(model, prompt, MAX_SEQ_LEN)
        step(**step_inputs(cache, random_prompt(1, num_queries), LENGTH))
    graphs = backend.report().graphs
    # One query, any number up to 8, any above.
    assert [graph.count("sparse") for graph in graphs] == [3, 3, 0]
    assert re.search(r"of s\d+ queries: 3 sparse", str(backend.report()))


@torch.no_grad()
@pytest.mark.parametrize(("max_q_len", "sparse_calls"), [(8, NUM_LAYERS - 1), (1, 0)])
def test_the_end_of_a_prompt_in_chunks_is_decoded_and_the_report_says_so(
    model, max_q_len, sparse_calls
):
    torch._dynamo.reset()
    config = quest_compile.QuestConfig(**SETTINGS | {"inner": "eager"}, max_q_len=max_q_len)
    backend = quest_compile.QuestBackend(config)
    step, prompt = torch.compile(model, backend=backend), random_prompt(1, 132)
    cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
    ops.reset_counters()
    for start in (0, 64, 128):
        step(**step_inputs(cache, prompt[:, start : start + 64], start))
    assert ops.counters()["sparse_calls"] == sparse_calls
    assert ("the last few tokens of a prompt in chunks" in str(backend.report())) == (max_q_len > 1)


@torch.no_grad()
def test_more_than_max_q_len_attend_everything(model):
    torch._dynamo.reset()
    backend = quest_compile.backend(**SETTINGS, num_sink_pages=1, max_q_len=4)
    step = torch.compile(model, backend=backend)
    for num_queries in (4, 5):
        cache = prefill(model, random_prompt(1, LENGTH), MAX_SEQ_LEN)
        ops.reset_counters()
        step(**step_inputs(cache, random_prompt(1, num_queries), LENGTH))
        assert (ops.counters()["sparse_calls"] > 0) == (num_queries == 4)
    assert backend.report().graphs[-1].rows[-1].reason.name == "PREFILL"


@torch.no_grad()
def test_a_short_first_prompt_is_right(model, step):
    """Nothing to select from yet."""
    ops.reset_counters()
    cache = prefill(model, random_prompt(1, 1), MAX_SEQ_LEN)
    logits = step(**step_inputs(cache, random_prompt(1, 7, seed=2), 1)).logits
    cache = prefill(model, random_prompt(1, 1), MAX_SEQ_LEN)
    expected = model(**step_inputs(cache, random_prompt(1, 7, seed=2), 1)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert ops.counters()["sparse_calls_covered"] == NUM_LAYERS - 1


@torch.no_grad()
def test_the_loop_of_the_documents_verifies_drafts(model, step):
    text = (Path(__file__).resolve().parents[1] / "docs" / "limits.md").read_text("utf-8")
    (loop,) = [
        part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "drafts" in part
    ]
    prompt = random_prompt(1, LENGTH)
    expected = [
        int(t) for t in greedy_tokens(step, prefill(model, prompt[:, :-1], MAX_SEQ_LEN), prompt)
    ]
    cache, found, last_token = prefill(model, prompt[:, :-1], MAX_SEQ_LEN), [], int(prompt[0, -1])
    while len(found) < 20:
        drafts = [*expected[len(found) :][:2], 1, 2]
        names = {"torch": torch, "step": step, "cache": cache, "drafts": drafts}
        names |= {"last_token": last_token, "length": LENGTH - 1 + len(found)}
        exec(loop, names)
        found += names["new_tokens"]
        last_token = found[-1]
    assert found == expected[: len(found)]


def greedy_tokens(step, cache, prompt):
    token = prompt[:, -1:]
    for i in range(30):
        token = greedy_step(step, cache, token, LENGTH - 1 + i)
        yield token
