"""The demonstration's book, read by SmolLM2-135M: Quest at the default settings finishes what it
begins, and the page that says how was read."""

import pytest
import torch
from test_real_model import NAME
from test_real_model import pytestmark as real_model

import quest_compile
from quest_compile import book, ops
from quest_compile.look.html import data_of
from quest_compile.look.looked import look_at
from quest_compile.reading import answer, read
from quest_compile.real_model import resolve_model

NUM_LAYERS = 30
pytestmark = [*real_model, pytest.mark.nightly]


@pytest.fixture(scope="module")
def reading():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(NAME)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return read(model, AutoTokenizer.from_pretrained(path), book.text(), 128)


def answers(reading, **settings):
    """Which of the tasks were right, and what the operators counted."""
    torch._dynamo.reset()
    ops.reset_counters()
    step = torch.compile(reading.model, backend=quest_compile.backend(inner="eager", **settings))
    right = []
    for task in book.tasks():
        limits = {"max_new_tokens": task.max_new_tokens, "stop": task.stop}
        made = answer(step, reading, reading.encode(task.prompt), **limits)
        right.append(task.is_right(made.text))
    return right, ops.counters()


def test_the_tasks_are_right_densely_and_with_quest_as_it_is_by_default(reading):
    dense, counted = answers(reading, num_dense_layers=NUM_LAYERS)
    assert counted["sparse_calls"] == 0 < counted["dense_calls"]
    quest, counted = answers(reading)
    assert counted["sparse_calls"] * 2 == counted["dense_calls"] * (NUM_LAYERS - 2) > 0
    assert counted["max_tokens_attended"] <= quest_compile.QuestConfig().budget
    assert sum(dense) >= 6
    assert sum(quest) >= sum(dense) - 1


def test_the_page_with_the_answer_is_read_far_more_often_than_by_chance(reading):
    torch._dynamo.reset()
    budget, task = 256, book.tasks()[0]
    quest = quest_compile.backend(budget=budget, inner="eager", record=True)
    looked = look_at(reading, quest, reading.encode(task.prompt), 4)
    pages = data_of(looked, NAME)["pages"]
    (page,) = [i for i, text in enumerate(pages[:400]) if task.wanted.split()[0] in text]
    heads = torch.stack([torch.cat(list(step.pages.values())) for step in looked.steps])
    assert heads.shape == (4, (NUM_LAYERS - 2) * 3, budget // 16)
    # A head that chose at random would read a page in 25. Most heads look for something else.
    share = (heads == page).any(-1).double().mean().item()
    assert share > 2 * (budget // 16) / len(pages)
