"""Shares by the native CUDA kernels on a GPU."""

import dataclasses

import pytest
import torch
from hostile import every_case, make_inputs
from test_every_op import assert_same_bits
from test_selection_shares import assert_selects_shares, random_scores

from quest_compile import ops
from quest_compile.ops.cuda_providers import provider_of

pytestmark = pytest.mark.cuda

SHARES = ({"top_p": 0.9}, {"budget_fraction": 0.3}, {"top_p": 0.5, "budget_fraction": 0.41})


@pytest.fixture(autouse=True)
def _native():
    if provider_of("sparse_decode") != "native":
        pytest.skip(f"no native CUDA kernels: {ops.native_status()}")


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "odd", "shares"])
@pytest.mark.parametrize("num_pages", [50, 2048, 10_000])
def test_selects_the_pages_of_the_cpu(num_pages, kind, shares):
    seq_lens = torch.tensor([16 * num_pages - 3, 16 * 30])
    scores = random_scores(kind, num_pages)
    for page_budget in (12, num_pages // 2):
        scale = None if kind == "shares" else 0.3
        settings = {"page_budget": page_budget, "score_scale": scale, **shares}
        expected = ops.select_pages(scores, seq_lens, **settings)
        actual = ops.select_pages(scores.cuda(), seq_lens.cuda(), **settings)
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@every_case
def test_sparse_decode_attends_what_is_chosen(case, shares):
    case = dataclasses.replace(case, budget_pages=9, **shares)
    inputs = make_inputs(case, "cuda")
    scores = inputs.scores()
    pages = inputs.pages(scores)
    assert_selects_shares(inputs, scores, pages)
    composed, _ = inputs.attend(pages)
    fits = inputs.fits()
    dense = ops.dense_decode(*inputs.dense())
    for _ in range(5):
        out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
        assert_same_bits([out[~fits], out[fits]], [composed[~fits], dense[fits]])
