"""Copies of a prepared model decode with their own weights; it can be pickled and saved."""

import copy
import io
import pickle

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops

SETTINGS = SHORT | {"budget": 64, "inner": "eager"}
PROMPT = random_prompt(1, 200)
NUM_STEPS = 5


def tokens(model):
    return model.generate(PROMPT, max_new_tokens=NUM_STEPS + 1, do_sample=False)[0, 200:].tolist()


def sparse_tokens(model):
    before = ops.counters()["sparse_calls"]
    found = tokens(model)
    assert ops.counters()["sparse_calls"] - before == NUM_STEPS * 2
    return found


def with_other_weights(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture
def model():
    torch._dynamo.reset()
    return quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)


@pytest.fixture(scope="module")
def answers():
    """What models decode that were never copied: with the weights of ``model``, and the others."""
    models = tiny_model("llama"), with_other_weights(tiny_model("llama"))
    own, others = (sparse_tokens(quest_compile.compile_for_generate(m, **SETTINGS)) for m in models)
    assert len(set(own)) > 1 and len(set(others)) > 1 and own != others
    return own, others


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved, lambda model: copy.deepcopy(copy.deepcopy(model))]


@pytest.mark.parametrize("make", COPIES, ids=["deepcopy", "pickle", "torch.save", "twice"])
@pytest.mark.parametrize("has_generated", [True, False])
def test_a_copy_decodes_with_its_own_weights(answers, model, make, has_generated):
    if has_generated:
        sparse_tokens(model)
    copied = with_other_weights(make(model))
    assert type(copied) is type(model)
    assert (sparse_tokens(model), sparse_tokens(copied)) == answers


def test_a_copy_is_restored_alone(model):
    sparse_tokens(model)
    copied = quest_compile.restore(copy.deepcopy(model))
    before = ops.counters()["sparse_calls"]
    assert tokens(copied) == tokens(tiny_model("llama"))
    assert ops.counters()["sparse_calls"] == before
    sparse_tokens(model)


def test_a_model_that_changes_its_dtype_decodes_in_the_new_one(model):
    sparse_tokens(model)
    fresh = quest_compile.compile_for_generate(tiny_model("llama").bfloat16(), **SETTINGS)
    assert sparse_tokens(model.bfloat16()) == sparse_tokens(fresh)


def test_a_prepared_model_is_one_of_its_class(model):
    plain = tiny_model("llama")
    assert isinstance(model, type(plain)) and repr(type(model)) == repr(type(plain))
    assert type(quest_compile.restore(model)) is type(plain)
