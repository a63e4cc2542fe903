"""A model spread over two processes decodes the tokens of one, each rank with its own heads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensor_parallel_rank import LENGTH, NUM_NEW_TOKENS, decode_all
from tiny_models import FEW_PAGES, tiny_model
from torch.testing._internal.two_tensor import TwoTensor

import quest_compile

pytest.importorskip("accelerate", reason="transformers shards with accelerate only")
pytest.importorskip("transformers.distributed.tensor_parallel")

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"
NUM_RANKS = 2


def torchrun(*command):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(NUM_RANKS)),
            *map(str, command),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def model():
    torch._dynamo.reset()
    return tiny_model("llama", vocab_size=258, num_hidden_layers=3)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    torchrun(SUPPORT / "tensor_parallel_rank.py", folder, results)
    return [json.loads((results / f"rank{i}.json").read_text()) for i in range(NUM_RANKS)]


@pytest.fixture(scope="module")
def alone(model):
    return decode_all(model)


@pytest.mark.parametrize("how", ["dense", "covering", "sparse", "generate"])
def test_tokens_are_those_of_one_process(ranks, alone, how):
    assert len(alone[how]["tokens"]) == NUM_NEW_TOKENS
    for rank in ranks:
        assert rank[how]["tokens"] == alone[how]["tokens"]


def test_a_covering_budget_gives_dense_tokens_and_a_small_one_attends_less(ranks):
    for rank in ranks:
        assert rank["covering"]["tokens"] == rank["dense"]["tokens"]
        assert rank["covering"]["sparse_calls_covered"] == NUM_NEW_TOKENS
        assert rank["sparse"]["sparse_calls_covered"] == 0
        assert 0 < rank["sparse"]["max_tokens_attended"] <= 64 < LENGTH


@pytest.mark.parametrize("how", ["sparse", "generate"])
def test_each_rank_reads_the_pages_of_its_own_heads(ranks, alone, how):
    for rank in ranks:
        assert rank[how]["sparse_calls"] == alone[how]["sparse_calls"] > 0
        assert rank[how]["sparse_calls_covered"] == 0
        for counter in ("sparse_rows", "tokens_attended", "bytes_read"):
            assert 0 < NUM_RANKS * rank[how][counter] == alone[how][counter], counter
        assert rank["num_local_parameters"] * NUM_RANKS == 64 * 32


@pytest.mark.parametrize("how", ["covering", "sparse", "generate"])
def test_each_rank_compiles_one_graph_and_reports_it(ranks, how):
    for rank in ranks:
        assert rank[how]["treatments"] == [["dense", "dense", "sparse"]]


@pytest.mark.nightly
def test_the_example_of_the_document_runs(folder, tmp_path):
    text = (ROOT / "docs" / "tensor_parallel.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "decode.py"
    inner = 'budget=64, inner="eager"'
    assert "budget=64" in example
    script.write_text(example.replace("budget=64", inner), encoding="utf-8")
    out = torchrun(script, folder)
    tokens = re.findall(r"rank \d: (\[\[.*\]\])", out)
    assert len(tokens) == NUM_RANKS
    assert len(set(tokens)) == 1
    assert out.count("3 attention calls: 1 sparse, 2 dense, 0 untouched") == NUM_RANKS


def _layer(query, key, key_cache, value_cache, position, mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, key)
    return torch.nn.functional.scaled_dot_product_attention(query, key_cache, value_cache, mask)


@pytest.mark.parametrize("wrapped", ["query", "caches"])
def test_a_tensor_subclass_in_the_graph_is_left_alone_and_said(wrapped):
    """TwoTensor stands for DTensor, for which torch itself needs minutes to plan SDPA on CPU."""
    torch._dynamo.reset()
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1, 16)
    caches = [torch.randn(1, 4, 256, 16) for _ in range(2)]
    mask = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    arguments = [query, key, *caches, torch.tensor([200]), mask]
    expected = _layer(*(x.clone() for x in arguments))
    for i in (0,) if wrapped == "query" else (2, 3):
        arguments[i] = TwoTensor(arguments[i], arguments[i].clone())
    backend = quest_compile.QuestBackend(
        quest_compile.QuestConfig(**FEW_PAGES, budget=64, num_dense_layers=0, inner="eager")
    )
    with torch.no_grad():
        out = torch.compile(_layer, backend=backend)(*arguments)
    assert [row.reason.name for row in backend.report().rows] == ["TENSOR_SUBCLASS"]
    torch.testing.assert_close(out.a, expected)
