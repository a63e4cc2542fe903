"""Adapters of peft: copied into the one that is there they cost no graph."""

import os
import re
from pathlib import Path

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig
from quest_compile.decoding import prefill, step_inputs

peft = pytest.importorskip("peft", reason="needs peft")
hotswap = pytest.importorskip("peft.utils.hotswap", reason="needs a peft that swaps adapters")
NUM_STEPS, LENGTH = 3, 200
LIMITS = Path(__file__).resolve().parents[1] / "docs" / "limits.md"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters that answer differently."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        config.init_lora_weights = False
        model = base()
        torch.manual_seed(seed)
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folders


def base():
    return tiny_model("llama", num_hidden_layers=3)


@torch.no_grad()
def decode(model, step):
    """Logits of NUM_STEPS given tokens."""
    tokens = random_prompt(1, LENGTH + NUM_STEPS)
    cache = prefill(model, tokens[:, :LENGTH], 512)
    steps = range(LENGTH, LENGTH + NUM_STEPS)
    return torch.cat([step(**step_inputs(cache, tokens[:, i : i + 1], i)).logits for i in steps])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    ops.reset_counters()


def backend_of():
    return QuestBackend(QuestConfig(**SHORT, budget=256, inner="eager"))


def test_a_swapped_adapter_decodes_sparsely_in_the_same_graph(adapters):
    expected = []
    for folder in adapters:
        model = peft.PeftModel.from_pretrained(base(), folder).eval()
        expected.append(decode(model, model))
    assert (expected[0] - expected[1]).abs().max() > 0.1
    backend = backend_of()
    model = peft.PeftModel.from_pretrained(base(), adapters[0]).eval()
    step = torch.compile(model, backend=backend)
    torch.testing.assert_close(decode(model, step), expected[0], rtol=1e-4, atol=1e-4)
    hotswap.hotswap_adapter(model, adapters[1], adapter_name="default")
    torch.testing.assert_close(decode(model, step), expected[1], rtol=1e-4, atol=1e-4)
    assert len(backend.report().graphs) == 1
    assert ops.counters()["sparse_calls_covered"] == 2 * NUM_STEPS


def test_the_recipe_of_the_document_runs_in_one_graph(adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("adapters")
    for name, folder in zip(("first", "second"), adapters):
        os.symlink(folder, f"adapters/{name}")
    (recipe,) = re.findall(
        r"```python\n(import[^`]*hotswap_adapter[^`]*)```", LIMITS.read_text("utf-8")
    )
    recipe = recipe.replace("budget=2048", "budget=64, inner='eager', **settings")
    model, found = base(), []
    answer = lambda step: found.append(decode(model, step))  # noqa: E731
    exec(recipe, {"model": model, "settings": SHORT, "decode": answer})
    assert (found[0] - found[1]).abs().max() > 0.1
    printed = capsys.readouterr().out
    assert "graph 0: 3 attention calls: 1 sparse, 2 dense" in printed and "graph 1" not in printed
    assert ops.counters()["sparse_calls"] == 2 * NUM_STEPS


def test_an_adapter_over_the_limit_of_graphs_runs_dense_and_is_in_the_report():
    """torch keeps 8 graphs of a function or more; here 2."""
    model, backend = base(), backend_of()
    for i in range(3):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        model.add_adapter(config, f"adapter{i}")
    step, found = torch.compile(model, backend=backend), []
    with torch._dynamo.config.patch(recompile_limit=2):
        for i in range(3):
            model.set_adapter(f"adapter{i}")
            ops.reset_counters()
            torch.testing.assert_close(
                decode(model, step), decode(model, model), rtol=1e-4, atol=1e-4
            )
            found.append((len(backend.report().graphs), ops.counters()["sparse_calls_covered"]))
    assert found == [(1, NUM_STEPS), (2, NUM_STEPS), (2, 0)]
    (function,) = backend.report().uncompiled
    assert f"{function}: calls that fit none of its 2 graphs run uncompiled" in str(
        backend.report()
    )
