"""budget_fraction and top_p: shares of the pages in use, and of the softmax over page scores."""

import fractions
import itertools
import math

import pytest
import torch
from hostile import Case, make_inputs
from test_select_pages import INF, NAN

from quest_compile import ops
from quest_compile.ops.reference import selection

P = 16


def select_by_loop(scores, live, *, page_budget, num_sink_pages=1, num_recent_pages=2,
                   budget_fraction=1.0, top_p=1.0, score_scale=1.0):  # fmt: skip
    """The contract, for one row and head: ``live`` bool [pages in use]. In exact numbers."""
    num_used = len(live)
    least = num_sink_pages + num_recent_pages + 1
    budget = min(page_budget, max(least, math.ceil(budget_fraction * num_used)))
    pages = [p for p in range(num_used) if live[p]]
    forced = {*pages[:num_sink_pages], *(p for p in pages if p >= num_used - num_recent_pages)}
    rest = [p for p in pages if p not in forced]
    rest.sort(key=lambda p: (0, 0.0, p) if scores[p] != scores[p] else (1, -scores[p], p))
    if top_p < 1:
        best = max((scores[p] for p in rest if scores[p] == scores[p]), default=-INF)
        weights = [weight_of(scores[p], best, score_scale) for p in rest]
        wanted, before, kept = top_p * float(sum(weights)), 0, []
        for page, weight in zip(rest, weights):
            if before < wanted:
                kept.append(page)
            before += weight
        rest = kept
    chosen = sorted(forced | set(rest[: budget - len(forced)]))
    return chosen + [-1] * (page_budget - len(chosen))


def weight_of(score, best, score_scale):
    if score_scale is None:
        return 1 << 30 if score != score else int(min(max(score, 0.0) * 2**24, 2**30))
    if score == best or score != score:
        return 1 << 30
    distance = torch.tensor([score, best, score_scale * 1.4426950408889634], dtype=torch.float32)
    octaves = float((distance[1] - distance[0]) * distance[2])
    octaves = min(octaves, 31.0) if octaves > 0 else 0.0
    units = math.floor(octaves * 65536)
    x = fractions.Fraction(65536 - units % 65536, 65536)
    power = 0
    for coefficient in (7270536, 27946717, 129584418, 372069241, 1 << 29):
        power = coefficient + math.floor(power * x)
    return power >> units // 65536


def assert_selects_shares(inputs, scores, actual):
    """``actual``: of Inputs.pages(scores)."""
    case, num_select_heads = inputs.case, scores.shape[1]
    attended = inputs.live.unflatten(1, (num_select_heads, -1)).any(2)
    settings = {**inputs.shares(), "page_budget": case.budget_pages}
    settings["score_scale"] = inputs.score_scale()
    for row, length in enumerate(case.lengths):
        for head in range(num_select_heads):
            own = attended[row, head, :length]
            live = [any(own[p : p + case.page_size]) for p in range(0, length, case.page_size)]
            expected = select_by_loop(scores[row, head].tolist(), live, **settings)
            assert actual[row, head].tolist() == expected, (row, head)


def random_scores(kind, num_pages):
    scores = torch.randn(2, 3, num_pages) * 4
    if kind == "ties":
        scores = scores.round()
    if kind == "shares":
        scores = scores.softmax(-1) * 4
        scores[0, 0, ::9], scores[1, 0, 5:], scores[1, 1] = NAN, 0.0, -INF
    if kind == "odd":
        scores[0, 0, ::7], scores[0, 1, 3::9], scores[1, 0] = NAN, INF, -INF
        scores[1, 1, 5:] = -INF
        scores[1, 2] = NAN
    return scores


SHARES = [
    {"top_p": top_p, "budget_fraction": fraction, "score_scale": scale}
    for top_p in (0.3, 0.9, 0.99, 1.0)
    for fraction in (1e-9, 0.25, 0.7, 1.0)
    for scale in (0.125, 1.0)
] + [{"top_p": 0.5, "score_scale": scale} for scale in (0.0, -1.0, None)]


@pytest.mark.parametrize("shares", SHARES, ids=lambda x: "-".join(map(str, x.values())))
def test_selects_as_the_contract_says(shares, device):
    num_pages, seq_lens = 50, torch.tensor([16 * 50 - 3, 16 * 30], device=device)
    for kind, with_mask in itertools.product(("plain", "ties", "odd", "shares"), (False, True)):
        scores = random_scores(kind, num_pages)
        mask = torch.rand(2, 3, 1, num_pages * P) < (0.08 if with_mask else 2)
        on_device = (scores.to(device), seq_lens, mask.to(device) if with_mask else None)
        for page_budget in (3, 12, 50):
            settings = {"page_budget": page_budget, **shares}
            actual = ops.select_pages(*on_device, **settings).tolist()
            for row, length in enumerate(seq_lens.tolist()):
                for head in range(3):
                    live = mask[row, head, 0, :length]
                    live = [any(live[p : p + P]) for p in range(0, length, P)]
                    one = scores[row, head].tolist()
                    assert actual[row][head] == select_by_loop(one, live, **settings)


def test_weights_are_the_exponential():
    octaves = torch.linspace(0, 33, 100_001)
    weight = selection._weight_of(octaves)
    exact = 2.0 ** (30 - octaves.double().clamp(max=31))
    assert ((weight - exact).abs() <= 2e-5 * exact + 1).all()
    assert weight[0] == 1 << 30 and weight[-1] == 0
    assert (weight.diff() <= 0).all()


def test_top_p_keeps_the_smallest_set_with_that_share():
    scores = torch.randn(1, 1, 100) * 3
    weights = scores[0, 0, 1:98].double().softmax(0)
    for top_p in (0.5, 0.9, 0.95):
        pages = ops.select_pages(scores, torch.tensor([1600]), page_budget=100, top_p=top_p)[0, 0]
        chosen = pages[(pages > 0) & (pages < 98)] - 1
        assert weights[chosen].sum() >= top_p - 1e-4
        assert weights[chosen].sum() - weights[chosen].min() < top_p


def test_counts_what_was_attended():
    counted = []
    for shares in ({}, {"budget_fraction": 0.25}, {"top_p": 0.05}):
        case = Case(torch.bfloat16, lengths=(500,), max_seq_len=512, budget_pages=20, **shares)
        inputs = make_inputs(case)
        ops.reset_counters()
        ops.sparse_decode(*inputs.sparse(), **inputs.settings())
        counted.append(ops.counters()["max_tokens_attended"])
    assert counted[0] == 20 * 16 - 12 and counted[1] == 8 * 16 - 12 and counted[2] < counted[0]
