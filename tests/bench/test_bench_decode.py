"""``bench decode`` on a tiny model: methods side by side, with proof of what each did."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quest_compile import ops
from quest_compile.bench import bench_decode
from quest_compile.bench.decode import check, methods
from quest_compile.bench.decode.models import filled_cache, random_model
from quest_compile.bench.results import load_results
from quest_compile.bench.shapes import SHAPES
from quest_compile.decoding import step_inputs

TINY = ["--model-shape", "tiny", "--contexts", "240", "--budgets", "64", "--dtype", "float32"]
FAST = ["--rounds", "3", "--max-load", "99", "--no-llama-cpp", "--settings", "quest"]

pytestmark = [
    pytest.mark.usefixtures("eager_decoding"),
    pytest.mark.skipif(not ops.native_status().loaded, reason="bench refuses to time plain torch"),
]


def test_methods_side_by_side_prove_what_they_did(tmp_path):
    assert bench_decode.main([*TINY, *FAST, "--output", str(tmp_path)]) == 0
    results = {r.method: r for r in load_results(tmp_path)}
    dense = list(methods.DENSE_METHODS)
    assert sorted(results) == sorted([*dense, "quest_64", "read_loop"])
    assert len({r.workload for r in results.values()}) == 1
    quest, ours = results["quest_64"].metadata, results["dense_decode"].metadata
    assert (quest["replaced_layers"], quest["sparse_layers"]) == (4, 2)
    assert quest["sparse_calls_per_step"] == 2
    assert ours["sparse_calls_per_step"] == 0
    assert ours["dense_calls_per_step"] == 4
    assert ours["linear_calls_per_step"] == quest["linear_calls_per_step"] == 7 * 4 + 1
    assert results["dense_decode_linear_torch"].metadata["linear_calls_per_step"] == 0
    assert 48 < quest["tokens_read_per_query"] <= 64
    assert quest["kv_bytes_per_step"] < ours["kv_bytes_per_step"]
    assert len({results[name].metadata["digest"] for name in dense}) == 1
    assert all(len(r.values) == 3 for r in results.values())


def test_budget_beyond_the_context_decodes_what_dense_decodes(tmp_path):
    wanted = ["--methods", "dense_decode,quest_512"]
    arguments = [*TINY, *FAST, *wanted, "--budgets", "512", "--output", str(tmp_path)]
    assert bench_decode.main(arguments) == 0
    results = {r.method: r.metadata for r in load_results(tmp_path)}
    assert results["quest_512"]["digest"] == results["dense_decode"]["digest"]
    assert results["quest_512"]["sparse_calls_per_step"] == 0


def test_resume_measures_the_methods_that_are_missing(tmp_path):
    arguments = [*TINY, *FAST, "--output", str(tmp_path)]
    assert bench_decode.main([*arguments, "--methods", "dense_decode"]) == 0
    assert {r.method for r in load_results(tmp_path)} == {"dense_decode", "read_loop"}
    assert bench_decode.main([*arguments, "--resume"]) == 0
    assert "quest_64" in {r.method for r in load_results(tmp_path)}


@pytest.mark.parametrize(("context", "num_sparse_steps"), [(64, 4), (62, 2)])
def test_a_budget_that_the_first_tokens_fit_is_counted_step_by_step(
    context, num_sparse_steps, tmp_path
):
    arguments = [*TINY, *FAST, "--methods", "quest_64", "--contexts", str(context)]
    assert bench_decode.main([*arguments, "--output", str(tmp_path)]) == 0
    (quest,) = (r.metadata for r in load_results(tmp_path) if r.method == "quest_64")
    # Of 4 steps, the one that warms up included.
    assert quest["sparse_calls_per_step"] == 2 * num_sparse_steps / 4


def test_a_wrong_attention_call_is_refused_and_the_others_are_measured(
    tmp_path, monkeypatch, capsys
):
    def all_wrong(name, out, *rest):
        return check_attention(name, out + 1e-2 if name == "sparse_decode" else out, *rest)

    check_attention = check.check_attention
    monkeypatch.setattr(check, "check_attention", all_wrong)
    arguments = [*TINY, *FAST, "--methods", "dense_decode,quest_64", "--output", str(tmp_path)]
    assert bench_decode.main(arguments) == 1
    assert "sparse_decode: wrong, error" in capsys.readouterr().err
    assert {r.method for r in load_results(tmp_path)} == {"dense_decode", "read_loop"}


def test_a_method_that_replaces_nothing_is_refused(tmp_path, monkeypatch, capsys):
    interpreter = check._Interpreter
    monkeypatch.setattr(interpreter, "call_function", check.fx.Interpreter.call_function)
    arguments = [*TINY, *FAST, "--methods", "dense_decode,quest_64", "--output", str(tmp_path)]
    assert bench_decode.main(arguments) == 1
    assert "quest_64: no layer was replaced" in capsys.readouterr().err


def test_quest_without_a_sparse_layer_is_refused(tmp_path, capsys):
    arguments = [*TINY, *FAST, "--layers", "2", "--output", str(tmp_path)]
    assert bench_decode.main([*arguments, "--methods", "dense_decode,quest_64"]) == 1
    err = capsys.readouterr().err
    assert "quest_64: no layer is sparse" in err
    # What goes on, without a terminal.
    assert "making tiny-2layers, float32" in err
    assert "checking and compiling: dense_decode, " in err
    assert f"threads{torch.get_num_threads()}: dense_decode, " in err
    assert {r.method for r in load_results(tmp_path)} == {"dense_decode", "read_loop"}


def test_keys_are_like_those_the_model_makes_and_share_topics():
    model = random_model(SHAPES["tiny"], torch.float32, "cpu", None)
    cache = filled_cache(model, 512, 520, batch=1)
    keys = cache.layers[1].keys[0, 0, :512]
    near = torch.cosine_similarity(keys[:-1], keys[1:], dim=-1)
    far = torch.cosine_similarity(keys[:-100], keys[100:], dim=-1)
    assert 0.35 < near.mean() < 0.65
    assert abs(far.mean()) < 0.1
    assert not cache.layers[1].keys[0, 0, 512:].any()


def test_caches_that_do_not_fit_are_said_before_they_are_made(monkeypatch, capsys):
    from quest_compile.bench.__main__ import main

    monkeypatch.setattr(methods, "_free_bytes", lambda device: 1000)
    assert main(["decode", *TINY, *FAST]) == 2
    assert "methods need" in capsys.readouterr().err


def test_enable_gqa_is_the_same_attention(monkeypatch):
    called = []

    def spy(*args, **kwargs):
        called.append(kwargs.get("enable_gqa"))
        return scaled_dot_product_attention(*args, **kwargs)

    model = random_model(SHAPES["tiny"], torch.float32, "cpu", None)
    from quest_compile.bench.decode.models import with_enable_gqa

    twin = with_enable_gqa(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters()))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        torch.testing.assert_close(twin(tokens).logits, expected)
    assert called == [True] * 4


def test_enable_gqa_is_compiled_apart_from_the_model_with_the_same_code():
    from quest_compile.bench.decode.models import with_enable_gqa

    uses_gqa = []

    def capture(gm, example_inputs):
        calls = [n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target)]
        uses_gqa.append({bool(n.kwargs.get("enable_gqa")) for n in calls})
        return gm.forward

    model = random_model(SHAPES["tiny"], torch.float32, "cpu", None)
    place = {"context": 24, "capacity": 32, "batch": 1}
    token = torch.zeros(1, 1, dtype=torch.int64)
    for own in (model, with_enable_gqa(model)):
        compiled = torch.compile(own, backend=capture)
        with torch.no_grad():
            compiled(**step_inputs(filled_cache(own, **place), token, 24))
    assert uses_gqa == [{False}, {True}]
