"""Sketches find what min/max bounds miss: the recall model at budgets where a page is an answer.

Through compiled graphs and the real operators; counters show that they ran. The limits are a
regression check of fixed contexts; the claim, with its interval, is in docs/page_sketches.md."""

import pytest
import torch

import quest_compile
from quest_compile import ops, recall
from quest_compile.decoding import greedy_step, prefill, rewind

STEPS_PER_QUESTION = 4


def share_right(num_tokens, num_records, num_questions, budget, seeds, **settings):
    """Answers right, all pages but the open one being chosen by their scores."""
    torch._dynamo.reset()
    model, num_right = recall.load_model(), 0
    settings |= {"budget": budget, "num_sink_pages": 0, "num_recent_pages": 1, "inner": "eager"}
    step = torch.compile(model, backend=quest_compile.backend(strict=True, **settings))
    ops.reset_counters()
    for seed in seeds:
        context = recall.make_context(num_tokens, num_records, num_questions, seed=seed)
        cache = prefill(model, context.tokens[None], num_tokens + 16)
        for question, answer in zip(context.questions, context.answers):
            rewind(cache, num_tokens)
            fed, answered = list(question), []
            for i in range(STEPS_PER_QUESTION):
                token = fed[i] if i < len(fed) else answered[-1]
                with torch.no_grad():
                    token = greedy_step(step, cache, token.view(1, 1), num_tokens + i).view(())
                if i >= len(fed) - 1:
                    answered.append(token)
            num_right += torch.equal(torch.stack(answered), answer)
    counted = ops.counters()
    num_calls = len(seeds) * num_questions * STEPS_PER_QUESTION
    assert counted["sparse_calls"] == num_calls
    assert counted["max_tokens_attended"] <= budget
    return num_right / (len(seeds) * num_questions)


def test_at_64_of_4096_tokens():
    task = (4096, 64, 64, 64, (100, 101))
    assert share_right(*task, summary="minmax") <= 0.5
    one_bit = share_right(*task, summary="sketch")
    assert one_bit >= 0.93
    assert share_right(*task, summary="sketch", sketch_bits=2) >= one_bit


@pytest.mark.nightly
def test_at_128_of_8192_tokens():
    task = (8192, 128, 64, 128, range(5))
    assert share_right(*task, summary="minmax") <= 0.45
    assert share_right(*task, summary="sketch") >= 0.8
