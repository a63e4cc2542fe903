"""The adapter of lm-evaluation-harness, against a stand-in with the methods it overrides."""

import importlib
import sys
import types

import pytest
import torch
from tiny_models import VOCAB_SIZE, random_prompt, tiny_model

BUDGET = 64


class HFLM:
    """What the adapter uses of lm_eval.models.huggingface.HFLM."""

    def __init__(self, pretrained, backend, batch_size):
        assert backend == "causal"
        self.model = pretrained
        self.eot_token_id = VOCAB_SIZE - 1

    def tok_decode(self, tokens, skip_special_tokens=True):
        return "".join(f"<{token}>" for token in tokens)


@pytest.fixture
def harness(monkeypatch):
    module = types.ModuleType("lm_eval.models.huggingface")
    module.HFLM = HFLM
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", module)
    monkeypatch.delitem(sys.modules, "quest_compile.eval.harness", raising=False)
    torch._dynamo.reset()
    yield importlib.import_module("quest_compile.eval.harness")
    sys.modules.pop("quest_compile.eval.harness", None)


@pytest.fixture
def model():
    return tiny_model("llama")


def quest_lm(harness, model, **options):
    settings = {"budget": BUDGET, "quest": {"inner": "eager"}} | options
    return harness.QuestLM(model, **settings)


def test_question_and_answer_are_decoded_sparsely(harness, model):
    settings = {"preset": "paper", "inner": "eager"}
    lm = quest_lm(harness, model, num_decoded_prompt_tokens=20, quest=settings)
    assert lm.quest.config.summary == "minmax"
    prompt = random_prompt(1, 200)
    out = lm._model_generate(prompt, 210, stop=[])
    assert out.shape == (1, 210)
    assert torch.equal(out[:, :200], prompt)
    assert lm.activity == {"samples": 1, "steps": 20 + 9, "sparse_steps": 20 + 9}


@pytest.mark.parametrize("num_decoded", [0, 1, 20, 500])
def test_a_budget_that_covers_everything_gives_what_generate_gives(harness, model, num_decoded):
    lm = quest_lm(harness, model, budget=1024, num_decoded_prompt_tokens=num_decoded)
    for length in (150, 90):
        prompt = random_prompt(1, length, seed=length)
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(lm._model_generate(prompt, length + 8, stop=[]), expected)
    assert lm.activity["sparse_steps"] == 0


def test_generation_ends_at_a_stop_text(harness, model):
    lm = quest_lm(harness, model)
    prompt = random_prompt(1, 150)
    whole = lm._model_generate(prompt, 170, stop=[])
    third = int(whole[0, 152])
    ended = lm._model_generate(prompt, 170, stop=["", f"<{third}>"])
    first = whole[0, 150:].tolist().index(third)
    assert torch.equal(ended, whole[:, : 150 + first + 1])


@pytest.mark.parametrize(
    "method", ["loglikelihood", "loglikelihood_rolling", "_loglikelihood_tokens"]
)
def test_log_likelihood_tasks_are_refused_with_the_reason(harness, model, method):
    with pytest.raises(NotImplementedError, match="never decode: Quest would not run"):
        getattr(quest_lm(harness, model), method)([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_decoded_prompt_tokens": -1}, "num_decoded_prompt_tokens must be at least 0"),
        ({"batch_size": 4}, "batch_size must be 1, got 4"),
        ({"budget": 0}, "budget: expected 1 or more tokens"),
        ({"quest": {"group": "none"}}, "unknown option group"),
    ],
)
def test_bad_settings_raise(harness, model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        quest_lm(harness, model, **options)


def test_sampling_and_batches_raise(harness, model):
    lm = quest_lm(harness, model)
    with pytest.raises(ValueError, match="only greedy decoding"):
        lm._model_generate(random_prompt(1, 9), 12, stop=[], do_sample=True, temperature=0.7)
    with pytest.raises(ValueError, match="one sample at a time, got a batch of 2"):
        lm._model_generate(random_prompt(2, 9), 12, stop=[])


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "quest_compile.eval.harness", raising=False)
    with pytest.raises(ImportError, match=r"quest-compile\[lm-eval\]"):
        importlib.import_module("quest_compile.eval.harness")
