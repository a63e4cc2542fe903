"""Shares of the context and of the softmax, by the CUDA kernels in emulation."""

# ruff: noqa: F401, I001 - tests run where they are imported.
import dataclasses

import pytest
import torch
from emulated_library import configure
from hostile import WAYS, Case, every_case, make_inputs
from test_attend_pages import assert_attends, listed_positions
from test_every_op import CASES as FEW_CASES
from test_every_op import assert_same_bits
from test_select_pages import INF, NAN
from test_selection_shares import assert_selects_shares, random_scores
from test_several_queries import make_call, run, run_alone

from quest_compile import ops
from quest_compile.ops import reference

SHARES = (
    {"top_p": 0.9},
    {"budget_fraction": 0.3},
    {"top_p": 0.5, "budget_fraction": 0.41},
    {"top_p": 0.99},
)
each_share = pytest.mark.parametrize("shares", SHARES, ids=lambda x: "-".join(map(str, x.values())))
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)


@each_share
@pytest.mark.parametrize("kind", ["plain", "ties", "odd", "shares"])
@pytest.mark.parametrize("score_scale", [0.125, 1.0, 0.0, -1.0, None])
def test_selects_the_pages_of_the_reference(kind, score_scale, shares):
    num_pages, seq_lens = 50, torch.tensor([16 * 50 - 3, 16 * 30])
    scores = random_scores(kind, num_pages)
    mask = torch.rand(2, 3, 1, num_pages * 16) < 0.08
    for attn_mask, page_budget in ((None, 12), (mask, 3), (mask, 50)):
        settings = {"page_budget": page_budget, "score_scale": score_scale, **shares}
        actual = ops.select_pages(scores, seq_lens, attn_mask, **settings)
        expected = reference.select_pages(scores, seq_lens, attn_mask, **settings)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("top_p", [1e-9, 1e-3, 0.3, 0.7, 0.9, 0.999, 1 - 2**-53])
def test_ties_around_the_share(top_p):
    """Many pages of one score: the share ends among them, at any count."""
    num_pages = 300
    scores = torch.zeros(4, 1, num_pages)
    scores[1, :, ::3], scores[2, :, ::2] = 1.0, NAN
    scores[3] = torch.arange(num_pages) // 50 * 1e-7
    seq_lens = torch.full((4,), 8 * num_pages)
    for page_budget in (5, 100, 300):
        settings = {"page_budget": page_budget, "page_size": 8, "top_p": top_p}
        actual = ops.select_pages(scores, seq_lens, **settings)
        assert torch.equal(actual, reference.select_pages(scores, seq_lens, **settings))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 1), (4, 3)])
def test_nothing_but_sinks_and_recents_within_the_budget(sizes):
    num_sink_pages, num_recent_pages = sizes
    scores, seq_lens = torch.randn(2, 2, 40), torch.tensor([640, 55])
    settings = {"num_sink_pages": num_sink_pages, "num_recent_pages": num_recent_pages}
    for budget_fraction in (1e-6, 1.0):
        kind = {"page_budget": sum(sizes), "top_p": 0.5, "budget_fraction": budget_fraction}
        actual = ops.select_pages(scores, seq_lens, **settings, **kind)
        assert torch.equal(actual, reference.select_pages(scores, seq_lens, **settings, **kind))


@each_share
@every_case
def test_sparse_decode_attends_what_is_chosen(case, shares):
    """Dense where all pages in use fit."""
    case = dataclasses.replace(case, budget_pages=9, **shares)
    inputs = make_inputs(case)
    configure(8)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    scores = inputs.scores()
    pages = inputs.pages(scores)
    assert_selects_shares(inputs, scores, pages)
    composed, _ = inputs.attend(pages)
    fits = inputs.fits()
    assert torch.equal(out[~fits], composed[~fits])
    assert torch.equal(out[fits], ops.dense_decode(*inputs.dense())[fits])


@few_cases
def test_no_gpu_and_no_order_changes_a_bit(case):
    inputs = make_inputs(dataclasses.replace(case, top_p=0.8, budget_fraction=0.4))
    outs = []
    for num_sms, seed in ((4, 0), (132, 1), (8, 2)):
        configure(num_sms, seed=seed)
        outs.append(ops.sparse_decode(*inputs.sparse(), **inputs.settings()))
    assert_same_bits(outs[1:], outs[:1] * 2)


def test_more_pages_than_shared_memory_holds():
    case = Case(torch.bfloat16, 8, 8, 1, 1, 8, (80_000,), 80_000, budget_pages=2100, **WAYS[4])
    case = dataclasses.replace(case, top_p=0.95, budget_fraction=0.2)
    inputs = make_inputs(case)
    configure(132)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    scores = inputs.scores()
    settings = {"page_budget": 2100, "page_size": 8, "score_scale": None, **inputs.shares()}
    expected = reference.select_pages(scores, inputs.seq_lens, **settings)
    assert torch.equal(inputs.pages(scores), expected)
    assert_attends(inputs, listed_positions(inputs, expected), out)


@pytest.mark.parametrize("mask", ["none", "heads"])
def test_each_query_has_the_bits_of_a_call_of_its_own(mask):
    case = Case(torch.bfloat16, lengths=(300, 90), max_seq_len=320, budget_pages=9)
    inputs = make_call(dataclasses.replace(case, top_p=0.7, budget_fraction=0.4), 3, mask)
    alone = [run_alone("sparse_decode", inputs, i) for i in range(3)]
    assert torch.equal(run("sparse_decode", inputs), torch.cat(alone, 2))
