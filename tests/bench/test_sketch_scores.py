"""bench sketch-accuracy: scores, answers and tables."""

import pytest
import torch

from quest_compile import ops
from quest_compile.bench.bench_sketch_accuracy import main
from quest_compile.bench.sketch_mass import mass_by_page, mass_kept
from quest_compile.bench.sketch_recall import measure_recall
from quest_compile.bench.sketch_scores import MAXIMUM, SUMMARIES, bytes_per_page, page_scores
from quest_compile.bench.sketch_tables import markdown
from quest_compile.ops import reference_sketch


@pytest.mark.parametrize(("name", "bits"), [*zip(MAXIMUM, (1, 2))])
def test_maximum_is_that_of_the_tokens_estimates(name, bits):
    query, keys = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 512, 64)
    rows, scale = ops.build_page_summary(keys, torch.tensor([512]), 16, "sketch", bits)
    mean = query.view(1, 2, 4, 64).mean(2, keepdim=True)
    logits = reference_sketch._logits(mean, rows, scale, 16, bits).amax(-1).squeeze(2)
    assert torch.allclose(page_scores(query, keys, name) / 1000, logits / 8, atol=0.01)
    log_sum = page_scores(query, keys, MAXIMUM[name])
    assert (log_sum > logits / 8 + 0.5).all()


def test_the_oracle_keeps_the_most_and_two_bits_more_than_one():
    pairs = [(torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1024, 64)) for _ in range(8)]
    assert mass_by_page(*pairs[0]).sum(-1).allclose(torch.ones(1, 2, 4))
    kept = mass_kept(iter(pairs), [4, 64])
    assert kept.keys() == {*SUMMARIES, *MAXIMUM, "oracle"}
    assert all(values[1] == pytest.approx(1) for values in kept.values())
    few = {name: values[0] for name, values in kept.items()}
    assert few["oracle"] == max(few.values()) > few["sketch, 2 bits"] > few["sketch"] > 4 / 64


def test_answers_and_mass_of_every_summary_with_their_intervals(tmp_path):
    torch._dynamo.reset()
    part = measure_recall(1024, 16, 16, [32], tmp_path)
    rows = {(row["method"], row["budget"]): row for row in part["rows"]}
    methods = {*SUMMARIES, *MAXIMUM, "oracle"}
    assert rows.keys() == {(m, 32) for m in methods} | {("dense", 0)}
    for row in rows.values():
        assert row["questions"] == 16 and row["high"] - row["low"] > 0.1
        assert row["low"] - 1e-6 <= row["right"] <= row["high"] + 1e-6
    assert all(0 < rows[method, 32]["mass_kept"] < 1 for method in methods)
    served = {m: rows[m, 32]["implementation"] for m in methods}
    assert all(served[name].startswith("quest_compile.backend") for name in SUMMARIES)
    assert rows["sketch", 32]["right"] > rows["minmax", 32]["right"]
    sizes = {"64": {name: bytes_per_page(64, name) for name in SUMMARIES}}
    text = markdown({"identity": {"commit": "x"}, "bytes_per_page": sizes, "recall": [part]})
    lines = text.splitlines()
    (line,) = [line for line in lines if line.startswith("| sketch, 2 bits, maximum |")]
    right = rows["sketch, 2 bits, maximum", 32]["right"]
    assert line.split(" | ")[1] == "1.34" and f" | {100 * right:.1f} [" in line
    assert [x for x in lines if x.startswith("| ")][-1].startswith("| oracle |")


def test_one_command_writes_json_and_markdown(tmp_path, monkeypatch):
    command = "quest_compile.bench.bench_sketch_accuracy"
    heads = [(torch.randn(1, 8, 1, 64), torch.randn(1, 2, 16 * 1024, 64))]
    monkeypatch.setattr(f"{command}.synthetic_heads", lambda kind: iter(heads))
    assert main(["--parts", "synthetic", "--out", str(tmp_path / "out.json")]) == 0
    assert '"sketch"' in (tmp_path / "out.json").read_text()
    assert "| random walk | 128 | " in (tmp_path / "out.md").read_text()
