"""What keeps generate() of a prepared model dense is said, and an error where strict is set."""

import copy
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.dense_causes import DenseCause

SETTINGS = SHORT | {"budget": 64, "inner": "eager"}
LENGTH = 200
PROMPT = random_prompt(1, LENGTH)
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "generate.md"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()
    quest_compile.backend(**SETTINGS).reset()


def prepared(**settings):
    return quest_compile.compile_for_generate(tiny_model("llama"), **SETTINGS | settings)


def generate(model, **arguments):
    return model.generate(PROMPT, max_new_tokens=6, do_sample=False, **arguments)[0, LENGTH:]


def own_loop(model, input_ids, **kwargs):
    for _ in range(6):
        logits = model.forward(input_ids).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
    return input_ids


def other_compiler():
    config = transformers.CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return config


CALLS = {
    DenseCause.OTHER_COMPILER: lambda: {"compile_config": other_compiler()},
    DenseCause.NOT_COMPILED: lambda: {"disable_compile": True},
    DenseCause.NO_CACHE: lambda: {"use_cache": False},
    DenseCause.OTHER_CACHE: lambda: {"cache_implementation": "dynamic"},
    DenseCause.BEAMS: lambda: {"num_beams": 2},
    DenseCause.DRAFTS: lambda: {"prompt_lookup_num_tokens": 3},
    DenseCause.CUSTOM: lambda: {"custom_generate": own_loop},
}


@pytest.mark.parametrize("cause", CALLS, ids=lambda cause: cause.name)
def test_a_call_that_is_dense_gives_dense_tokens_a_warning_and_a_line_of_the_report(cause):
    arguments = CALLS[cause]()
    expected = generate(tiny_model("llama"), **arguments)
    with pytest.warns(UserWarning, match=re.escape(cause.value)):
        found = generate(prepared(), **arguments)
    assert torch.equal(found, expected)
    assert ops.counters()["sparse_calls"] == 0
    report = quest_compile.backend(**SETTINGS).report()
    assert f"1 generate() call decoded densely: {cause.value}" in str(report)
    assert report.as_dict()["dense_generations"] == {cause.value: 1}


@pytest.mark.parametrize("cause", CALLS, ids=lambda cause: cause.name)
def test_a_call_that_is_dense_is_an_error_under_strict(cause):
    model = prepared(strict=True)
    with pytest.raises(quest_compile.QuestStrictError, match=re.escape(cause.value)):
        generate(model, **CALLS[cause]())
    generate(model)
    assert ops.counters()["sparse_calls"] == 10


def test_an_assistant_makes_its_drafts_densely():
    expected = generate(tiny_model("llama"))
    with pytest.warns(UserWarning, match=DenseCause.ASSISTANT.value):
        found = generate(tiny_model("llama"), assistant_model=prepared())
    assert torch.equal(found, expected)


def test_autocast_decodes_densely():
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(tiny_model("llama"))
        with pytest.warns(UserWarning, match=DenseCause.AUTOCAST.value):
            assert torch.equal(generate(prepared()), expected)
        with pytest.raises(quest_compile.QuestStrictError, match="autocast"):
            generate(prepared(strict=True))


def test_settings_that_were_replaced_are_noticed():
    model = prepared()
    model.generation_config = transformers.GenerationConfig()
    with pytest.warns(UserWarning, match="generation_config was replaced"):
        generate(model)
    quest_compile.compile_for_generate(model, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model)
    assert ops.counters()["sparse_calls"] == 10


MODELS = {
    DenseCause.QUANTIZER: {"hf_quantizer": types.SimpleNamespace(is_compileable=False)},
    DenseCause.OFFLOADED: {"hf_device_map": {"model": "cpu", "lm_head": "disk"}},
}


@pytest.mark.parametrize("cause", MODELS, ids=lambda cause: cause.name)
def test_a_model_that_generate_never_compiles_is_named_beforehand(cause):
    model = tiny_model("llama")
    vars(model).update(MODELS[cause])
    with pytest.warns(UserWarning, match=re.escape(cause.value)):
        quest_compile.compile_for_generate(model, **SETTINGS)
    with pytest.warns(UserWarning, match=re.escape(cause.value)):
        assert cause.value in str(quest_compile.warmup(model, 256))
    with pytest.raises(quest_compile.QuestStrictError, match=re.escape(cause.value)):
        quest_compile.compile_for_generate(model, **SETTINGS, strict=True)


@pytest.mark.parametrize("map", [{"": "cpu"}, {"": 0}, None])
def test_a_model_on_one_device_is_no_cause(map):
    model = tiny_model("llama")
    model.hf_device_map = map
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quest_compile.compile_for_generate(model, **SETTINGS)


def test_strict_notices_steps_that_torch_runs_uncompiled():
    """A model that needs more graphs than torch keeps is run as it is."""
    model = prepared(strict=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        generate(model)
        with pytest.raises(quest_compile.QuestStrictError, match="without one sparse step"):
            generate(copy.deepcopy(model).bfloat16())


def test_strict_wants_no_sparse_step_of_a_call_that_makes_one_token():
    model = prepared(strict=True)
    model.generate(PROMPT, max_new_tokens=1, do_sample=False)
    assert ops.counters()["sparse_calls"] == 0


def test_a_prompt_longer_than_the_context_of_the_model_is_said():
    model = quest_compile.compile_for_generate(
        tiny_model("llama", max_position_embeddings=LENGTH), **SETTINGS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model)
    too_long = torch.cat([PROMPT, PROMPT[:, :1]], 1)
    with pytest.warns(UserWarning, match="prompt has 201 tokens, and the model was made for 200"):
        model.generate(too_long, max_new_tokens=2, do_sample=False)
    assert ops.counters()["sparse_calls"] == 12


@pytest.mark.parametrize("is_seen", [False, True])
def test_a_hook_registered_late_runs_in_decode_with_the_switch_of_the_document(is_seen):
    calls = []
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not is_seen):
        model = prepared()
        generate(model)
        model.model.layers[2].register_forward_hook(lambda *args: calls.append(1))
        generate(model)
    assert len(calls) == (6 if is_seen else 1)
    assert ops.counters()["sparse_calls"] == 20


def test_continuous_batching_is_dense_and_the_report_names_it():
    batching = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    (answer,) = (
        prepared()
        .generate_batch(
            PROMPT.tolist(), generation_config=config, continuous_batching_config=batching
        )
        .values()
    )
    assert answer.generated_tokens == generate(tiny_model("llama")).tolist()
    assert ops.counters()["sparse_calls"] == 0
    report = str(quest_compile.backend(**SETTINGS).report())
    assert "no graph was compiled" in report and "generate_batch()" in report


def test_the_document_explains_every_cause():
    rows = re.findall(r"^\| `([A-Z_]+)` \| .{20,} \|$", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert rows == [cause.name for cause in DenseCause]
