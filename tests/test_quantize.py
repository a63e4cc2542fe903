"""Quantised weights and sparse steps at once."""

import argparse
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model

from quest_compile import cli, ops, quantize
from quest_compile.backend import QuestBackend
from quest_compile.bench import bench_decode
from quest_compile.bench.decode.models import weight_bytes
from quest_compile.config import QuestConfig
from quest_compile.decoding import greedy_step, prefill

NUM_STEPS, LENGTH = 3, 200
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "quantised_weights.md"


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("torchao", reason="needs torchao")
    return quantize.quantize(tiny_model("llama", num_hidden_layers=3), "int8")


def decode(model, step):
    prompt = random_prompt(1, LENGTH)
    cache = prefill(model, prompt[:, :-1], 512)
    token, tokens = prompt[:, -1:], []
    with torch.no_grad():
        for i in range(NUM_STEPS):
            token = greedy_step(step, cache, token, LENGTH - 1 + i)
            tokens.append(int(token))
    return tokens


def test_int8_weights_decode_sparsely(model):
    torch._dynamo.reset()
    ops.reset_counters()
    backend = QuestBackend(QuestConfig(**SHORT, budget=256, inner="eager", strict=True))
    assert decode(model, torch.compile(model, backend=backend)) == decode(model, model)
    assert ops.counters()["sparse_calls_covered"] == NUM_STEPS


def test_the_recipe_of_the_document_decodes_sparsely(tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    torch._dynamo.reset()
    ops.reset_counters()
    recipe = re.search(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)[1]
    settings = SHORT | {"budget": 64, "inner": "eager", "strict": True}
    names = {"path": tmp_path, "settings": settings}
    exec(recipe.replace("budget=2048", "**settings"), names)
    names["model"].generate(random_prompt(1, LENGTH), max_new_tokens=NUM_STEPS + 1)
    assert ops.counters()["sparse_calls"] == NUM_STEPS
    assert weight_bytes(names["model"]) < weight_bytes(tiny_model("llama", num_hidden_layers=3)) / 2


def test_int8_weights_are_counted_as_they_are_stored(model):
    projection = model.model.layers[0].mlp.up_proj.weight
    # Besides a byte per weight some scales and zero points.
    assert 1 < quantize.stored_bytes(projection) / projection.numel() < 1.25
    assert weight_bytes(model) < weight_bytes(tiny_model("llama", num_hidden_layers=3)) / 2


@pytest.fixture
def no_torchao(monkeypatch):
    find_spec = importlib.util.find_spec
    without = lambda name, *args: None if name == "torchao" else find_spec(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)


@pytest.mark.parametrize("command", [["demo"], ["eval", "recall", "--quick"]])
def test_commands_name_the_missing_package(command, no_torchao, capsys):
    assert cli.main([*command, "--quantize", "int8"]) != 0
    assert "--quantize int8 needs torchao" in capsys.readouterr().err


def test_the_benchmark_names_the_missing_package(no_torchao, capsys):
    with pytest.raises(SystemExit):
        bench_decode.main(["--quantize", "int8", "--list"])
    assert "--quantize int8 needs torchao" in capsys.readouterr().err


def test_quantised_workloads_have_a_name_of_their_own():
    args = argparse.Namespace(model=None, quantize="int8", model_shape="llama-3.2-1b", layers=2)
    assert bench_decode.shape_name(args) == "llama-3.2-1b-2layers-int8"
