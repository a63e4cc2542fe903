"""``bench prefill`` on tiny shapes: it measures what it says, and refuses what is not so."""

import pytest
import torch

from quest_compile import ops
from quest_compile.bench import bench_prefill
from quest_compile.bench.prefill import attention, models
from quest_compile.bench.results import RefusedError, load_results
from quest_compile.bench.shapes import SHAPES

TINY = SHAPES["tiny"].layer
ARGUMENTS = ["--model-shape", "tiny", "--contexts", "96", "--rounds", "2", "--max-load", "99"]

pytestmark = pytest.mark.skipif(
    not ops.native_status().loaded, reason="refused: plain torch serves"
)


def methods_of(results, what):
    return {r.method for r in results if r.workload.endswith(what)}


def test_attention_of_a_layer_beside_products_of_matrices(tmp_path, capsys):
    methods = "dense_prefill,sdpa_causal,gemm"
    arguments = [*ARGUMENTS, "--dtype", "float32,bfloat16", "--methods", methods]
    assert bench_prefill.main([*arguments, "--output", str(tmp_path)]) == 0
    results = load_results(tmp_path)
    assert methods_of(results, "attention") == set(methods.split(","))
    assert all(min(result.values) > 0 for result in results)
    assert {r.metadata["flops"] for r in results} == {2 * 4 * 96 * 96 * 16}
    assert "tiny/bfloat16" in capsys.readouterr().out


@pytest.mark.inductor
def test_first_token_of_a_whole_model(tmp_path):
    arguments = [*ARGUMENTS, "--dtype", "float32", "--layers", "2"]
    methods = ["--methods", "transformers,quest"]
    assert bench_prefill.main([*arguments, *methods, "--output", str(tmp_path)]) == 0
    results = load_results(tmp_path)
    assert methods_of(results, "first token") == {"transformers", "quest"}
    assert {r.metadata["prefill_calls"] for r in results} == {2}


def test_a_wrong_result_is_refused(monkeypatch):
    right = ops.dense_prefill
    monkeypatch.setattr(ops, "dense_prefill", lambda *x: right(*x) * 1.1)
    with pytest.raises(RefusedError, match="dense_prefill: error"):
        attention.make_calls(TINY, 96, 1, torch.float32)


def test_a_model_whose_layers_keep_sdpa_is_refused(monkeypatch):
    from quest_compile.bench.decode.models import random_model

    model = random_model(SHAPES["tiny"], torch.float32, "cpu", 2)
    real = models.QuestConfig
    monkeypatch.setattr(models, "QuestConfig", lambda **x: real(prefill="sdpa", inner="eager"))
    with pytest.raises(RefusedError, match="ran in 0 of 2 layers"):
        models.make_samplers(model, 96, 1, ("quest",))
