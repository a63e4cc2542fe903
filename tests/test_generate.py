"""A prepared model: its settings are printed, compared, saved and taken back."""

import copy
import json

import pytest
import torch
import transformers
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile

SETTINGS = SHORT | {"budget": 64, "num_dense_layers": 1, "inner": "eager"}


@pytest.fixture
def model():
    torch._dynamo.reset()
    return quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS)


def tokens(model):
    return model.generate(random_prompt(1, 200), max_new_tokens=8, do_sample=False)[0, 200:]


def sparse_calls(model):
    before = quest_compile.ops.counters()["sparse_calls"]
    tokens(model)
    return quest_compile.ops.counters()["sparse_calls"] - before


def test_generation_settings_can_be_printed_compared_and_turned_into_json(model):
    config = model.generation_config
    assert '"static"' in repr(config) and str(config)
    assert config == copy.deepcopy(config) and config != transformers.GenerationConfig()
    fields = json.loads(config.to_json_string())
    changed = quest_compile.backend(**SETTINGS).changed_settings()
    assert fields["compile_config"]["options"] == changed
    again = transformers.GenerationConfig.from_dict(config.to_dict())
    assert again.cache_implementation == "static" and "_replaced" not in config.to_dict()
    assert sparse_calls(model) > 0


def test_generation_settings_can_be_given_to_from_pretrained(model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = model.generation_config
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, generation_config=config)
    assert torch.equal(tokens(other), tokens(model))


def test_the_report_is_that_of_the_backend_with_the_same_settings(model):
    assert sparse_calls(model) > 0
    graphs = quest_compile.backend(**SETTINGS).report().graphs
    assert [graph.count("sparse") for graph in graphs if graph.is_decode] == [3]


def test_a_budget_that_is_a_function_is_kept_as_it_is():
    def budget(layer):
        return 64

    settings = SETTINGS | {"budget": budget}
    model = quest_compile.compile_for_generate(tiny_model("llama"), **settings)
    assert isinstance(model.generation_config.compile_config.backend, quest_compile.QuestBackend)
    assert sparse_calls(model) > 0


@pytest.mark.parametrize("cache", [None, "dynamic"])
def test_nothing_of_ours_is_saved(cache, tmp_path):
    model = tiny_model("llama")
    model.generation_config.cache_implementation = cache
    quest_compile.compile_for_generate(model, **SETTINGS)
    tokens(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text("utf-8"))
    assert saved.get("cache_implementation") == cache and "compile_config" not in saved
    assert model.generation_config.cache_implementation == "static"


def test_restore_gives_back_the_model_as_it_was(model):
    tokens(model)
    assert quest_compile.restore(model) is model
    config = model.generation_config
    assert type(config) is transformers.GenerationConfig
    assert config.cache_implementation is None and config.compile_config is None
    assert config == tiny_model("llama").generation_config
    assert sparse_calls(model) == 0
    assert torch.equal(tokens(model), tokens(tiny_model("llama")))
    quest_compile.restore(quest_compile.restore(model))
    quest_compile.compile_for_generate(model, **SETTINGS)
    assert sparse_calls(model) > 0


def test_preparing_twice_is_undone_once(model):
    quest_compile.compile_for_generate(model, **SETTINGS | {"budget": 96})
    quest_compile.restore(model)
    assert model.generation_config.cache_implementation is None


def test_restore_wants_a_model_that_generates():
    with pytest.raises(TypeError, match="model must be a transformers model"):
        quest_compile.restore(torch.nn.Linear(2, 2))
