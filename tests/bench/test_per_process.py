"""``bench memory`` and ``bench compile``: a process per value, what its result carries."""

import dataclasses
import functools
import os
import signal
import threading
from multiprocessing.context import SpawnProcess

import pytest
import torch

from quest_compile import ops
from quest_compile.bench import bench_compile, bench_memory, per_process
from quest_compile.bench.__main__ import main
from quest_compile.bench.decode import fresh_start
from quest_compile.bench.decode.fresh_start import Found, Probe, measure_fresh
from quest_compile.bench.decode.models import random_model
from quest_compile.bench.decode.probe import facts_of
from quest_compile.bench.results import RefusedError, Result, load_results
from quest_compile.bench.settings import Setting
from quest_compile.bench.shapes import SHAPES
from quest_compile.ops.summaries.sketch import row_bytes

TINY = ["--contexts", "240", "--budgets", "64", "--dtype", "float32", "--settings", "quest"]
TINY += ["--max-load", "99", "--rounds", "1"]
SHAPE = ["--model-shape", "tiny"]
PROBE = Probe("quest_64", "tiny", "float32", None, 240, 1, 1, "cpu", (Setting("quest", 64),))

pytestmark = pytest.mark.skipif(
    not ops.native_status().loaded, reason="bench refuses to time plain torch"
)


@pytest.fixture
def eager(monkeypatch):
    """Probes compile nothing, in whichever process."""
    monkeypatch.setattr(per_process, "Probe", functools.partial(Probe, inner="eager"))


@pytest.fixture
def in_process(eager, monkeypatch):
    """No process is started."""
    threads = torch.get_num_threads()

    def run(probe):
        torch._dynamo.reset()
        return measure_fresh(probe)

    for module in (bench_memory, bench_compile):
        monkeypatch.setattr(module, "run_probe", run)
    yield
    torch.set_num_threads(threads)


def saved(folder, family, **settings):
    """A tiny model of a transformers family in ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, vocab_size=64, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(tmp_path):
    """With room for 256 tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return saved(tmp_path / "llama", "llama", max_position_embeddings=256, **sizes, **heads)


def check_facts(facts):
    """Of quest_64 over 240 to 245 tokens, with three layers or four."""
    num_sparse = facts["layers"] - 2
    assert (facts["replaced_layers"], facts["sparse_layers"]) == (facts["layers"], num_sparse)
    assert facts["sparse_calls"] == 5 * num_sparse and facts["steps"] == 5
    assert facts["sparse_calls_per_step"] == num_sparse
    assert facts["dense_calls_per_step"] == 2
    assert 48 < facts["tokens_read_per_query"] <= 64
    assert 0 < facts["kv_bytes_per_step"] < facts["layers"] * 240 * 2 * 2 * 16 * 4
    assert 0 <= facts["tokens_as_dense"] <= 5 and 0 < facts["logits_distance_to_dense"] < 2
    assert len(facts["digest"]) == 16 and facts["other_load"] >= 0
    for name in ("commit", "torch", "transformers", "kernels", "threads", "instruction_set"):
        assert facts[name], name


@pytest.mark.usefixtures("eager")
def test_memory_of_a_model_of_ones_own_and_resume(llama, tmp_path, monkeypatch, capsys):
    arguments = [*TINY, "--model", llama, "--output", str(tmp_path / "out")]
    arguments += ["--methods", "dense_transformers,quest_64"]
    assert bench_memory.main(arguments) == 0
    results = load_results(tmp_path / "out")
    title = f"memory/llama/float32/batch1/context240/threads{torch.get_num_threads()}"
    found = {(r.workload.removeprefix(f"{title}/"), r.method): r for r in results}
    kinds = {"peak", "peak_before_decoding", "cache", "weights"}
    assert {kind for kind, method in found if method == "dense_transformers"} == kinds
    assert {kind for kind, method in found if method == "quest_64"} == kinds | {"page_summaries"}
    # Three layers of 2 heads of 8 channels, float32, room for 250 tokens: 16 pages, and counters.
    assert found["cache", "quest_64"].median == 3 * 2 * 2 * 250 * 8 * 4
    page = 2 * row_bytes(head_dim=8, page_size=16, sketch_bits=2)
    assert found["page_summaries", "quest_64"].median == 1 * (16 * page + 16)
    assert all(r.unit == "byte" for r in results)
    quest = found["peak", "quest_64"].metadata
    check_facts(quest)
    assert quest["shape"] == "llama" and quest["compiler"] == "eager"
    dense = found["peak", "dense_transformers"].metadata
    assert (dense["tokens_as_dense"], dense["sparse_calls_per_step"]) == (5, 0)
    assert dense["logits_distance_to_dense"] < 1e-5
    assert dense["kv_bytes_per_step"] == found["cache", "quest_64"].median
    assert f"bench memory: {title}, quest_64, " in capsys.readouterr().err
    monkeypatch.setattr(bench_memory, "run_probe", None)
    assert bench_memory.main([*arguments, "--resume"]) == 0
    assert len(load_results(tmp_path / "out")) == len(results)


@pytest.mark.nightly
@pytest.mark.inductor
def test_compile_with_cold_and_warm_caches_and_resume(tmp_path, monkeypatch):
    arguments = [*TINY, *SHAPE, "--layers", "3", "--methods", "quest_64"]
    arguments += ["--output", str(tmp_path)]
    assert bench_compile.main(arguments) == 0
    results = {r.workload.rpartition("/")[2]: r for r in load_results(tmp_path)}
    tokens = {f"{n} token, {state}" for n in ("first", "second") for state in ("cold", "warm")}
    assert set(results) == tokens | {"passes"}
    assert [len(r.values) for r in results.values()].count(1) == 4
    assert len(results["passes"].values) == 2
    for result in results.values():
        assert result.unit == "second" and min(result.values) > 0
        check_facts(result.metadata)
        assert result.metadata["compiler"] == "inductor"
    monkeypatch.setattr(bench_compile, "run_probe", None)
    assert bench_compile.main([*arguments, "--resume"]) == 0


@pytest.mark.usefixtures("eager")
def test_an_interrupt_ends_the_process_and_keeps_what_is_done(tmp_path, monkeypatch):
    run_probe, methods = bench_memory.run_probe, []

    def interrupted(probe):
        methods.append(probe.method)
        if probe.method == "dense_decode":
            torch._dynamo.reset()
            return measure_fresh(probe)
        # The process has begun and takes seconds.
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            return run_probe(probe)
        finally:
            timer.cancel()

    exit_codes, join = [], SpawnProcess.join

    def joined(process):
        join(process)
        exit_codes.append(process.exitcode)

    monkeypatch.setattr(SpawnProcess, "join", joined)
    monkeypatch.setattr(bench_memory, "run_probe", interrupted)
    arguments = [*TINY, *SHAPE, "--methods", "dense_decode,quest_64", "--output", str(tmp_path)]
    # Processes of pytest-xdist ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert bench_memory.main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert methods == ["dense_decode", "quest_64"]
    assert exit_codes == [-signal.SIGTERM]
    assert {r.method for r in load_results(tmp_path)} == {"dense_decode"}


@pytest.mark.usefixtures("eager")
def test_a_model_that_cannot_be_replaced_is_refused(tmp_path, capsys):
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "rotary_dim": 8, "n_positions": 256}
    model = saved(tmp_path / "gptj", "gptj", **sizes)
    arguments = [*TINY, "--model", model, "--output", str(tmp_path / "out")]
    assert bench_memory.main([*arguments, "--methods", "quest_64"]) == 1
    assert "RefusedError: no layer was replaced" in capsys.readouterr().err
    assert not load_results(tmp_path / "out")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("bench", [bench_memory, bench_compile])
def test_quest_without_a_sparse_layer_is_refused(bench, tmp_path, capsys):
    arguments = [*TINY, *SHAPE, "--layers", "2", "--output", str(tmp_path)]
    assert bench.main([*arguments, "--methods", "dense_decode,quest_64"]) == 1
    assert "no layer is sparse" in capsys.readouterr().err
    assert {r.method for r in load_results(tmp_path)} == {"dense_decode"}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("method", ["dense_decode", "quest_512"])
def test_wrong_logits_are_refused(method, monkeypatch):
    compilation_of = fresh_start.compilation_of

    def of_other_weights(name, model, *settings):
        other = random_model(SHAPES["tiny"], torch.float32, "cpu", None)
        torch.nn.init.normal_(other.model.layers[0].mlp.down_proj.weight)
        return compilation_of(name, other, *settings)

    monkeypatch.setattr(fresh_start, "compilation_of", of_other_weights)
    settings = (Setting("quest", 512),)
    torch._dynamo.reset()
    with pytest.raises(RefusedError, match="logits are wrong"):
        measure_fresh(dataclasses.replace(PROBE, method=method, settings=settings, inner="eager"))


def test_processes_that_decode_differently_are_refused():
    alike, other = (Found({}, {"digest": digest, "steps": 5}) for digest in "ab")
    assert facts_of([alike, alike]) == {"digest": "a", "steps": 5}
    with pytest.raises(RefusedError, match="decoded differently"):
        facts_of([alike, other])


def test_load_marks_times_and_not_sizes():
    results = [Result("x", "quest_64", [1.0], {}, unit) for unit in ("second", "byte")]
    per_process._with_facts(results, {"other_load": 1.0, "marked": "loaded"})
    assert [r.marked for r in results] == ["loaded", ""]
    assert all(r.metadata["other_load"] == 1.0 for r in results)


@pytest.mark.parametrize("name", ["memory", "compile", "decode", "longrun"])
def test_contexts_beyond_the_model_are_an_error(name, llama, capsys):
    rounds = ["--rounds", "32"]
    assert main([name, *TINY, *rounds, "--contexts", "250", "--model", llama]) == 2
    assert "llama take at most 256 tokens, got 250 and " in capsys.readouterr().err
    assert main([name, *TINY, *SHAPE, *rounds, "--contexts", "200K"]) == 2
    assert "models with random weights take at most" in capsys.readouterr().err
