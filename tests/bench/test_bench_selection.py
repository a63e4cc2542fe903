"""The ways to select that are timed do what their names say."""

import json

import pytest
import torch

from quest_compile import ops
from quest_compile.bench import bench_selection


@pytest.fixture
def small():
    """What is counted over two copies of 1024 tokens, with two KV heads."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 1024, 16, generator=generator).bfloat16()
    queries = [torch.randn(1, 4, 1, 16, generator=generator).bfloat16() for _ in range(8)]
    caches = [keys.clone() for _ in range(2)]

    def counted(name, rounds=1):
        sample = bench_selection.way(bench_selection.WAYS[name], 128, queries, caches)
        ops.reset_counters()
        assert all(sample(number) > 0 for number in range(rounds))
        return ops.counters()

    return counted


@pytest.mark.parametrize("name", bench_selection.WAYS)
def test_every_way_is_sparse(small, name):
    counted = small(name)
    assert counted["sparse_calls"] == 8 * 2
    assert counted["max_tokens_attended"] <= (1024 if name.startswith("budget") else 128)


def test_a_share_is_that_of_the_pages_in_use(small):
    assert small("budget=0.125")["max_tokens_attended"] <= 8 * 16


@pytest.mark.parametrize(("every", "scored"), [(2, 4), (4, 2), (8, 1)])
def test_select_every_scores_one_step_in_so_many(small, every, scored):
    counted = small(f"select_every={every}", rounds=2)
    assert counted["sparse_calls"] == 2 * 8 * 2
    assert counted["sparse_calls_unscored"] == 2 * (8 - scored) * 2


def test_the_command_writes_a_row_per_way(tmp_path, monkeypatch):
    pair = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1024, 16)
    monkeypatch.setattr(bench_selection, "synthetic_heads", lambda *_, **__: [pair] * 4)
    out = tmp_path / "selection.json"
    options = ["--budgets", "64", "128", "--rounds", "2", "--max-load", "9", "--out", str(out)]
    assert bench_selection.main(options) == 0
    found = json.loads(out.read_text())
    assert {"commit", "kernels"} <= found["identity"].keys()
    assert len(found["rows"]) == 2 * len(bench_selection.WAYS)
    assert all(row["tokens_read"] <= 128 for row in found["rows"])
