"""The attention mass that eval says was kept."""

import json

import pytest
import torch

from quest_compile import cli


@pytest.mark.parametrize("settings", ["num_sink_pages=0,num_recent_pages=1", "preset=paper"])
def test_audits_find_the_mass_that_plain_torch_finds(settings, tmp_path):
    """Of each budget and context for itself, though a graph adds up all its audits."""
    torch._dynamo.reset()
    audited, plain = f"quest:{settings},audit=1", f"quest-reference:{settings}"
    unaudited = f"quest:{settings}"
    task = ["--lengths", "1024", "--tasks", "recall-16", "--samples", "32"]
    methods = ["--budgets", "64", "128", "--methods", audited, plain, unaudited]
    assert cli.main(["eval", "recall", "--out", str(tmp_path), *task, *methods]) == 0
    mass = {}
    for line in map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines()):
        if "cell" in line:
            *_, context, method, budget = line["cell"]
            mass[method, budget, context] = line["activity"]["mass_kept"]
    for budget in (64, 128):
        for context in (0, 1):
            expected = mass[plain, budget, context]
            assert mass[audited, budget, context] == pytest.approx(expected, abs=1e-4)
            assert mass[unaudited, budget, context] is None
    assert mass[plain, 64, 0] < mass[plain, 128, 0] and mass[plain, 64, 0] != mass[plain, 64, 1]
