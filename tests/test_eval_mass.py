"""The attention mass that eval says was kept."""

import json

import pytest
import torch

from quest_compile import cli

OWN = "quest:num_sink_pages=0,audit=1"
PLAIN = "quest-reference:num_sink_pages=0"


def test_audits_find_the_mass_that_plain_torch_finds(tmp_path):
    """Of each budget and context for itself, though a graph adds up all its audits."""
    torch._dynamo.reset()
    task = ["--lengths", "1024", "--tasks", "recall-16", "--samples", "32"]
    methods = ["--budgets", "64", "128", "--methods", OWN, PLAIN, "quest"]
    assert cli.main(["eval", "recall", "--out", str(tmp_path), *task, *methods]) == 0
    mass = {}
    for line in map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines()):
        if "cell" in line:
            *_, context, method, budget = line["cell"]
            mass[method, budget, context] = line["activity"]["mass_kept"]
    for budget in (64, 128):
        for context in (0, 1):
            expected = mass[PLAIN, budget, context]
            assert mass[OWN, budget, context] == pytest.approx(expected, abs=1e-4)
            assert mass["quest", budget, context] is None
    assert mass[PLAIN, 64, 0] < mass[PLAIN, 128, 0] and mass[PLAIN, 64, 0] != mass[PLAIN, 64, 1]
