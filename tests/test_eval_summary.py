"""The sentence at the end of quest-compile eval."""

import pytest

from quest_compile.eval.records import Cell
from quest_compile.eval.summary import sentence


def lines(quest, dense=(1,) * 20, *, budget=512, sparse=True, tokens_read=400.0):
    """A context of 4000 tokens per answer; scores are 0 or 1."""
    activity = {"steps": 4, "sparse_steps": 4 * sparse, "tokens_read": tokens_read}
    found = {}
    for method, of, scores in (("dense", 0, dense), ("quest", budget, quest)):
        for i, score in enumerate(scores):
            line = {"kind": "answer", "scores": [[score]], "context_tokens": 4000}
            found[Cell("passkey", 4096, i, method, of)] = line | {"activity": activity}
    return found


def test_what_was_asked_what_was_right_and_what_was_read():
    assert sentence(lines([1] * 20)) == (
        "Of 20 questions (passkey) about contexts of 4000 tokens the model answers 20 right "
        "without Quest, 20 with Quest at budget 512 (as many), whose sparse layers read 10% of "
        "the cache."
    )


@pytest.mark.parametrize(
    ("quest", "dense", "said"),
    [
        ([1] * 19 + [0], [1] * 20, "19 with Quest at budget 512 (no more different than by chance"),
        ([1] * 10 + [0] * 10, [1] * 20, "10 with Quest at budget 512 (worse by more than chance)"),
        ([1] * 20, [1] * 8 + [0] * 12, "20 with Quest at budget 512 (better by more than chance)"),
        ([0] * 20, [0] * 19 + [1], "1 right without Quest (too few to lose any), 0 with"),
    ],
)
def test_chance(quest, dense, said):
    assert said in sentence(lines(quest, dense))


def test_every_budget_has_its_part():
    both = lines([1] * 20) | lines([1] * 20, budget=0.05, tokens_read=200.0)
    assert "20 with Quest at budget 512 (as many), whose sparse layers read 10%" in sentence(both)
    assert "; 20 with Quest at budget 0.05 (as many), whose sparse layers read 5%" in sentence(both)


def test_dense_by_construction_reads_all():
    assert "read 100% of the cache" in sentence(lines([1] * 20, sparse=False, tokens_read=None))


def test_on_a_gpu_nothing_is_counted():
    assert "read an uncounted part" in sentence(lines([1] * 20, tokens_read=None))


def test_without_answers_there_is_none():
    assert sentence({}) == ""
    own = {cell: line | {"kind": "perplexity"} for cell, line in lines([1] * 20).items()}
    assert sentence(own) == ""
