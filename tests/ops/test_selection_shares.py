"""budget_fraction and top_p: shares of the pages in use, and of the softmax over page scores."""

import dataclasses
import fractions
import math

import pytest
import torch
from hostile import CASES, Case, make_inputs
from test_select_pages import INF, NAN

from quest_compile import ops
from quest_compile.ops import reference, reference_selection

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
] + [{"top_p": 0.5, "score_scale": 0.0}, {"top_p": 0.5, "score_scale": -1.0}]


@pytest.mark.parametrize("kind", ["plain", "ties", "odd"])
@pytest.mark.parametrize("shares", SHARES, ids=lambda x: "-".join(map(str, x.values())))
def test_selects_as_the_contract_says(kind, shares, device):
    num_pages, seq_lens = 50, torch.tensor([16 * 50 - 3, 16 * 30], device=device)
    scores = random_scores(kind, num_pages)
    for with_mask in (False, True):
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
    weight = reference_selection._weight_of(octaves)
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


def settings_of(inputs, **shares):
    return inputs.settings() | shares


@pytest.mark.parametrize("shares", [{"top_p": 0.9}, {"budget_fraction": 0.3}, SHARES[2]])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_decode_is_score_select_attend(case, shares):
    """And dense bit for bit where all pages in use fit."""
    shares = {name: value for name, value in shares.items() if name != "score_scale"}
    inputs = make_inputs(dataclasses.replace(case, budget_pages=9))
    out = ops.sparse_decode(*inputs.sparse(), **settings_of(inputs, **shares))
    kind = {"page_size": case.page_size, "group_reduce": case.group_reduce}
    query, _, _, rows, lengths, mask = inputs.sparse()
    scores = ops.score_pages(query, rows, lengths, **kind)
    scale = case.head_dim**-0.5
    scale = scale / case.group_size if case.group_reduce == "sum" else scale
    choice = {"page_budget": 9, "page_size": case.page_size, "score_scale": scale, **shares}
    pages = ops.select_pages(scores, lengths, mask, **choice)
    composed = inputs.attend(pages)
    num_used = -(-lengths // case.page_size)
    share = (num_used * shares.get("budget_fraction", 1.0)).ceil().clamp(min=4)
    fits = num_used <= share.clamp(max=9)
    assert torch.equal(out[~fits], composed[~fits])
    assert torch.equal(out[fits], ops.dense_decode(*inputs.dense())[fits])


def test_sketches_are_logits_already():
    inputs = make_inputs(Case(torch.float32, lengths=(500, 333), max_seq_len=512, summary="sketch"))
    query, keys, values, rows, lengths, _ = inputs.sparse()
    kind = {"summary": "sketch", "scale": 0.3}
    scores = ops.score_pages(query, rows, lengths, inputs.channel_scale, **kind)
    pages = ops.select_pages(scores, lengths, page_budget=10, top_p=0.8)
    expected, _ = ops.attend_pages(query, keys, values, pages, lengths, scale=0.3)
    call = (query, keys, values, rows, lengths, None, inputs.channel_scale)
    assert torch.equal(ops.sparse_decode(*call, budget=160, top_p=0.8, **kind), expected)


def test_a_row_does_not_depend_on_the_others_nor_on_threads():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(500, 333, 64), max_seq_len=512))
    settings = settings_of(inputs, top_p=0.9, budget_fraction=0.2)
    expected = ops.sparse_decode(*inputs.sparse(), **settings)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert torch.equal(ops.sparse_decode(*inputs.sparse(), **settings), expected)
    for row in range(3):
        alone = [x if x is None else x[row : row + 1] for x in inputs.sparse()]
        assert torch.equal(ops.sparse_decode(*alone, **settings), expected[row : row + 1])


def test_counts_what_was_attended():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(500,), max_seq_len=512, budget_pages=20))
    counted = []
    for shares in ({}, {"budget_fraction": 0.25}, {"top_p": 0.05}):
        ops.reset_counters()
        ops.sparse_decode(*inputs.sparse(), **settings_of(inputs, **shares))
        counted.append(ops.counters()["max_tokens_attended"])
    assert counted[0] == 20 * 16 - 12 and counted[1] == 8 * 16 - 12 and counted[2] < counted[0]
    ops.reset_counters()
    reference_out, selected = reference.sparse_decode(
        *inputs.sparse(), **settings_of(inputs, budget_fraction=0.25)
    )
    assert int((selected[0][1] >= 0).sum(-1).max()) == 8


BAD = [("budget_fraction", 0.0), ("budget_fraction", 1.5), ("budget_fraction", NAN),
       ("top_p", 0.0), ("top_p", -1.0), ("top_p", 1.01), ("top_p", NAN)]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [*BAD, ("score_scale", INF), ("score_scale", NAN)])
def test_bad_shares_name_themselves(name, value):
    inputs = make_inputs(Case(torch.bfloat16, lengths=(100,)))
    choice = (inputs.scores(), inputs.seq_lens)
    for select in (ops.select_pages, torch.ops.quest.select_pages):
        with pytest.raises((ValueError, RuntimeError), match=name):
            select(*choice, page_budget=4, **{name: value})
    if name != "score_scale":
        for decode in (ops.sparse_decode, torch.ops.quest.sparse_decode):
            with pytest.raises((ValueError, RuntimeError), match=name):
                decode(*inputs.sparse(), budget=64, **{name: value})


def test_a_share_of_another_type_is_a_type_error():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(100,)))
    with pytest.raises(TypeError, match="top_p"):
        ops.sparse_decode(*inputs.sparse(), budget=64, top_p="0.9")


def test_opcheck():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(500,), max_seq_len=512))
    shares = {"top_p": 0.9, "budget_fraction": 0.5}
    choice = (inputs.scores(), inputs.seq_lens)
    torch.library.opcheck(
        torch.ops.quest.select_pages.default,
        choice,
        {"page_budget": 4, "score_scale": 2.0} | shares,
    )
    settings = settings_of(inputs, **shares)
    torch.library.opcheck(torch.ops.quest.sparse_decode.default, inputs.sparse(), settings)
