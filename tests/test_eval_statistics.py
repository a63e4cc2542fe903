"""Verdicts: what a paired comparison may say, and when it may not."""

import random

import pytest

from quest_compile.eval.losses import compare_losses
from quest_compile.eval.statistics import (
    INCONCLUSIVE,
    NO_WORSE,
    WORSE,
    compare,
    design_effect,
    paired_interval,
    wilson_interval,
)


def scores(both=0, lost=0, gained=0, neither=0):
    dense = [1.0] * (both + lost) + [0.0] * (gained + neither)
    method = [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * neither
    return dense, method, range(len(dense))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        # Newcombe 1998, method 10, 36/12/2/0, and the case without any discordant pair.
        ((36, 2, 12, 0), (0.0569, 0.3404)),
        ((36, 12, 2, 0), (-0.3404, -0.0569)),
        ((54, 0, 0, 0), (-0.0664, 0.0664)),
    ],
)
def test_paired_intervals_of_the_literature(cells, expected):
    assert paired_interval(*cells) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval_of_the_literature():
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_intervals_cover_the_true_difference():
    """95 % intervals of 400 simulated experiments: between 91 and 99 % of them hold the truth."""
    rng = random.Random(1)
    true, covered = -0.05, 0
    for _ in range(400):
        drawn = rng.choices(range(4), weights=(0.80, 0.08, 0.03, 0.09), k=150)
        low, high = paired_interval(*(drawn.count(cell) for cell in range(4)))
        covered += low <= true <= high
    assert 0.91 <= covered / 400 <= 0.99


@pytest.mark.parametrize(
    ("cells", "verdict"),
    [
        ({"both": 1000}, NO_WORSE),
        ({"both": 900, "neither": 100}, NO_WORSE),
        ({"both": 500, "gained": 500}, NO_WORSE),
        ({"both": 900, "lost": 100}, WORSE),
        ({"lost": 20}, WORSE),
        ({"both": 20}, INCONCLUSIVE),
        ({"both": 1}, INCONCLUSIVE),
        ({"both": 95, "lost": 3, "gained": 2}, INCONCLUSIVE),
    ],
)
def test_verdicts(cells, verdict):
    assert compare(*scores(**cells), margin=0.01).verdict == verdict


@pytest.mark.parametrize(
    "cells", [{"both": 20}, {"both": 96, "lost": 2, "gained": 2}, {"both": 97, "lost": 3}]
)
def test_the_samples_said_to_be_needed_are_enough_and_not_too_many(cells):
    needed = compare(*scores(**cells), margin=0.02).num_needed
    total = sum(cells.values())

    def verdict(factor):
        grown = {name: round(count * needed * factor / total) for name, count in cells.items()}
        return compare(*scores(**grown), margin=0.02).verdict

    assert needed > total
    assert verdict(1.2) != INCONCLUSIVE
    assert verdict(0.8) == INCONCLUSIVE


def test_partial_scores_are_bounded_by_whole_ones():
    """A score between 0 and 1 varies less than right and wrong with the same mean."""
    dense, method = [1.0] * 50, [0.5] * 50
    found = compare(dense, method, range(50), margin=0.01)
    assert found.difference == -0.5
    assert found.lost == 25
    assert found.verdict == WORSE
    assert compare([0.7] * 30, [0.7] * 30, range(30), margin=0.01).verdict == INCONCLUSIVE


def test_questions_of_one_context_do_not_count_as_independent():
    dense = [1.0] * 100
    method = [0.0] * 20 + [1.0] * 80
    alone = compare(dense, method, range(100), margin=0.01)
    together = compare(dense, method, [i // 20 for i in range(100)], margin=0.01)
    assert design_effect([0.0] * 5, [1] * 5) == 1
    assert together.design_effect > 10
    assert alone.verdict == WORSE
    assert together.verdict == INCONCLUSIVE
    assert together.low < alone.low


@pytest.mark.parametrize(
    ("dense", "method", "contexts"),
    [([], [], []), ([1.0], [1.0, 0.0], [0]), ([2.0], [1.0], [0]), ([1.0], [-0.1], [0])],
)
def test_scores_that_cannot_be_compared_raise(dense, method, contexts):
    with pytest.raises(ValueError, match="must"):
        compare(dense, method, contexts, margin=0.01)


class TestLosses:
    def runs(self, mean, spread, num_runs):
        rng = random.Random(0)
        return [[rng.gauss(mean, spread) for _ in range(64)] for _ in range(num_runs)]

    @pytest.mark.parametrize(
        ("mean", "spread", "num_runs", "verdict"),
        [
            (0.0, 0.05, 40, NO_WORSE),
            (0.1, 0.05, 40, WORSE),
            (0.008, 0.5, 40, INCONCLUSIVE),
            (0.0, 0.0, 19, INCONCLUSIVE),
            (1.0, 0.0, 4, INCONCLUSIVE),
        ],
    )
    def test_verdicts(self, mean, spread, num_runs, verdict):
        assert compare_losses(self.runs(mean, spread, num_runs), 0.01).verdict == verdict

    def test_neighbours_that_agree_widen_the_interval(self):
        signs = [1 if i % 2 else -1 for i in range(40)]
        alike = compare_losses([[sign * 0.1] * 64 for sign in signs], 0.01)
        mixed = compare_losses([[0.1, -0.1] * 32 for _ in signs], 0.01)
        assert alike.high - alike.low > 0.03
        assert mixed.high - mixed.low < 1e-9

    def test_no_tokens_raise(self):
        with pytest.raises(ValueError, match="at least one token"):
            compare_losses([], 0.01)
