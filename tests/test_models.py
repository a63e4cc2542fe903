"""Nine families decode the tokens of dense eager decoding if the budget covers them.

The cache is larger than the budget, so that the sparse path runs; the counters prove that it did.
Runs against several transformers versions: ``make test-transformers``.
"""

import functools

import pytest
import torch
import transformers
from tiny_models import NUM_LAYERS, SHORT, left_padded_prompt, random_prompt, tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.decoding import step_inputs

# Every family, more briefly: test_model_matrix.py.
FAMILIES = "llama llama_mha qwen2 qwen3 mistral phi3 gpt_neox mixtral olmo2".split()
NUM_NEW_TOKENS = 60
MAX_SEQ_LEN = 768
SETTINGS = SHORT | {"budget": 512, "inner": "aot_eager"}
SPARSE_STEPS = (NUM_LAYERS - 2) * (NUM_NEW_TOKENS - 1)
PROMPTS = {
    "batch_1": lambda: (random_prompt(1, 300), torch.ones(1, 300, dtype=torch.int64)),
    "left_padded_batch_3": lambda: left_padded_prompt([310, 300, 77]),
}
IS_TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5


@functools.cache
def expected_tokens(family, prompt):
    """Greedy tokens of the uncompiled model with its default cache."""
    tokens, attention_mask = PROMPTS[prompt]()
    return _generate(tiny_model(family), tokens, attention_mask)


def _generate(model, tokens, attention_mask, **settings):
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=attention_mask,
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            **settings,
        )
    return out[:, tokens.shape[1] :].tolist()


def _static_cache_settings():
    """A cache that is larger than the budget, as the version at hand spells it."""
    if IS_TRANSFORMERS_4:
        return {}
    return {"max_cache_len": MAX_SEQ_LEN}


def _model_with_large_cache(family, prompt="batch_1"):
    model = tiny_model(family)
    if IS_TRANSFORMERS_4:
        # transformers 4 keeps the largest cache it ever made for a model and batch size.
        batch = PROMPTS[prompt]()[0].shape[0]
        longest = random_prompt(batch, MAX_SEQ_LEN - NUM_NEW_TOKENS)
        settings = {"cache_implementation": "static", "disable_compile": True}
        _generate(model, longest, torch.ones_like(longest), **settings)
    return model


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


parametrize = pytest.mark.parametrize
all_prompts = parametrize("prompt", PROMPTS)
# generate is one for all of them: the others nightly.
SOME = ("llama", "mixtral")
some_families = parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in SOME else pytest.mark.nightly)
        for family in FAMILIES
    ],
)


@all_prompts
@parametrize("family", FAMILIES)
def test_direct_call_with_a_static_cache_gives_dense_tokens(family, prompt):
    model = tiny_model(family)
    backend = quest_compile.backend(**SETTINGS)
    step = torch.compile(model, backend=backend)
    tokens, attention_mask = PROMPTS[prompt]()
    length = tokens.shape[1]
    cache = transformers.StaticCache(config=model.config, max_cache_len=MAX_SEQ_LEN)
    out = []
    with torch.no_grad():
        for position in range(length - 1, length - 1 + NUM_NEW_TOKENS):
            if not out:
                call, inputs = model, step_inputs(cache, tokens, 0)
                mask = attention_mask
            else:
                call, inputs = step, step_inputs(cache, out[-1], position)
                mask = torch.nn.functional.pad(attention_mask, (0, len(out)), value=1)
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]
            if prompt != "batch_1":
                inputs |= {"attention_mask": mask, "position_ids": position_ids}
            out.append(call(**inputs).logits[:, -1:].argmax(-1))
    assert torch.cat(out, 1).tolist() == expected_tokens(family, prompt)
    assert ops.counters()["sparse_calls_covered"] == SPARSE_STEPS
    assert backend.report().count("untouched") == 0


@all_prompts
@some_families
def test_generate_with_a_compile_config_gives_dense_tokens(family, prompt):
    model = _model_with_large_cache(family, prompt)
    backend = quest_compile.backend(**SETTINGS)
    compile_config = transformers.CompileConfig(backend=backend, fullgraph=False)
    compile_config._compile_all_devices = True
    tokens = _generate(
        model,
        *PROMPTS[prompt](),
        cache_implementation="static",
        compile_config=compile_config,
        **_static_cache_settings(),
    )
    assert tokens == expected_tokens(family, prompt)
    assert ops.counters()["sparse_calls_covered"] == SPARSE_STEPS
    assert backend.report().count("untouched") == 0


@all_prompts
@some_families
def test_compile_for_generate_gives_dense_tokens(family, prompt):
    model = _model_with_large_cache(family, prompt)
    assert quest_compile.compile_for_generate(model, **SETTINGS) is model
    tokens = _generate(model, *PROMPTS[prompt](), **_static_cache_settings())
    assert tokens == expected_tokens(family, prompt)
    assert ops.counters()["sparse_calls_covered"] == SPARSE_STEPS
    report = quest_compile.backend(**SETTINGS).report()
    assert report.count("sparse") == NUM_LAYERS - 2
    assert report.count("dense") == 2


@pytest.mark.inductor
@parametrize("family", ["llama"])
def test_inductor_gives_dense_tokens(family):
    model = _model_with_large_cache(family)
    quest_compile.compile_for_generate(model, **SHORT, budget=512)
    tokens = _generate(model, *PROMPTS["batch_1"](), **_static_cache_settings())
    assert tokens == expected_tokens(family, "batch_1")
    assert ops.counters()["sparse_calls_covered"] == SPARSE_STEPS
