"""backend(record=True): the pages that were attended, from inside the compiled graph."""

import pytest
import torch
from attended_pages import recorded_pages
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill

LENGTH, MAX_SEQ_LEN, STEPS = 300, 336, 4
SETTINGS = {**SHORT, "budget": 64, "inner": "aot_eager"}
FORMATS = [
    {},
    {"summary": "minmax", "group_reduce": "none"},
    {"top_p": 0.5, "num_sink_pages": 0, "num_recent_pages": 1},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def decode(model, backend, on_step=lambda: None, length=LENGTH, max_seq_len=MAX_SEQ_LEN):
    """The tokens, and what the operators counted."""
    prompt = random_prompt(1, length)
    cache = prefill(model, prompt[:, :-1], max_seq_len)
    step = torch.compile(model, backend=backend, dynamic=False)
    token, tokens = prompt[:, -1:], []
    ops.reset_counters()
    with torch.no_grad():
        for position in range(length - 1, length - 1 + STEPS):
            token = greedy_step(step, cache, token, position)
            tokens.append(int(token))
            on_step()
    return tokens, ops.counters()


@pytest.mark.parametrize("settings", FORMATS, ids=str)
def test_recording_changes_no_token_and_no_count(model, settings):
    plain = decode(model, quest_compile.backend(**SETTINGS | settings))
    torch._dynamo.reset()
    assert decode(model, quest_compile.backend(**SETTINGS | settings, record=True)) == plain


@pytest.mark.parametrize("settings", FORMATS, ids=str)
def test_the_pages_are_those_that_were_attended(model, settings):
    """Attended: seen in the output of quest::sparse_decode, without recording."""
    backend = quest_compile.backend(**SETTINGS | settings, record=True)
    recorded = []
    decode(model, backend, lambda: recorded.append(backend.recorded()))
    torch._dynamo.reset()
    with recorded_pages() as attended:
        decode(model, quest_compile.backend(**SETTINGS | settings))
    layers = list(recorded[0])
    assert layers == [2, 3] and len(attended) == len(layers) * STEPS
    calls = [step[layer] for step in recorded for layer in layers]
    for pages, seen in zip(calls, attended, strict=True):
        pages = pages[0, 0].repeat_interleave(len(seen) // pages.shape[2], 0)
        for head, of_head in zip(pages.tolist(), seen):
            assert [p for p in head if p >= 0] == of_head.nonzero()[:, 0].tolist()


def test_of_several_graphs_only_the_last_step_counts(model):
    """Three lengths of cache: the budget of layer 3 covers the second, both cover the third."""
    settings = SETTINGS | {"budget": {2: 64, 3: 128}, "inner": "eager"}
    backend = quest_compile.backend(**settings, record=True)
    layers = []
    keep = lambda: layers.append(list(backend.recorded()))  # noqa: E731
    decode(model, backend, keep)
    decode(model, backend, keep, length=100, max_seq_len=112)
    assert layers == [[2, 3]] * STEPS + [[2]] * STEPS
    decode(model, backend, length=40, max_seq_len=64)
    with pytest.raises(ValueError, match="the last step had no sparse layer"):
        backend.recorded()
    decode(model, backend, keep)
    assert layers[2 * STEPS :] == [[2, 3]] * STEPS
    assert len(backend.report().graphs) == 3
