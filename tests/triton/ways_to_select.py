"""Shares of the context and of the softmax on the Triton kernels: as both_summaries.py, small and
collected by test_triton_interpreted.py alone."""

import pytest
import torch
from hostile import NAN, Case, make_inputs

from quest_compile import ops
from quest_compile.ops import reference
from quest_compile.ops.settings import Selection
from quest_compile.ops.triton import launch_scoring, launch_selection

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHARES = (
    {"budget_fraction": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.5, "score_scale": 0.37, "budget_fraction": 0.41},
    {"top_p": 0.99, "score_scale": -1.0},
    {"top_p": 0.8, "score_scale": None},
)


def make_scores(seed, num_pages):
    """Some the same, some not finite, one head without any number."""
    scores = torch.randn(2, 3, num_pages, generator=torch.Generator().manual_seed(seed)) * 3
    scores[0] = scores[0].round()
    scores[0, 1, 5], scores[1, 0, 3], scores[1, 1, 4] = NAN, -torch.inf, torch.inf
    scores[0, 2] = NAN
    scores[1, 2, 2:] = -0.0
    return scores


@pytest.mark.parametrize(
    ("shares", "num_pages", "tile"),
    [*((shares, 23, 8192) for shares in SHARES), (SHARES[2], 30, 16), (SHARES[4], 30, 16)],
)
def test_selects_the_pages_of_the_reference(shares, num_pages, tile, monkeypatch):
    """In one tile, and in two."""
    monkeypatch.setattr(launch_scoring, "_MAX_TILE", tile)
    scores = make_scores(num_pages, num_pages)
    if shares.get("score_scale", 1.0) is None:
        scores = scores.clamp(min=0)
    lengths = torch.tensor([num_pages * 8 - 3, 100])
    mask = torch.rand(2, 1, 1, num_pages * 8) < 0.2
    for page_budget, attn_mask in ((6, None), (num_pages, mask)):
        settings = {"page_budget": page_budget, "page_size": 8, **shares}
        actual = ops.select_pages(scores, lengths, attn_mask, **settings)
        assert torch.equal(actual, reference.select_pages(scores, lengths, attn_mask, **settings))


def test_rows_that_fit_are_those_with_few_pages():
    for fraction in (1e-3, 0.1, 0.3, 0.5, 0.9, 0.99, 1 - 2**-53, 1.0):
        for page_budget in (4, 7, 100, 1000):
            selection = Selection(budget=16 * page_budget + 15, budget_fraction=fraction)
            fitting = launch_selection.fitting_pages(selection, 16)
            for n in range(1, page_budget + 3):
                most = reference.page_budget_of(
                    n, page_budget=page_budget, budget_fraction=fraction
                )
                assert (n <= fitting) == (n <= most), (fraction, page_budget, n)


@pytest.mark.parametrize("tile", [8192, 16])
def test_shares_are_joined_in_tiles(tile, monkeypatch):
    monkeypatch.setattr(launch_scoring, "_MAX_TILE", tile)
    scores = make_scores(1, 30).repeat(1, 2, 1)[:, None]
    expected = reference.scores.shares(scores[:, 0].unflatten(1, (3, 2)))
    actual = launch_scoring.join_rows(scores, 3)[:, 0]
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_a_step_in_tiles_selects_the_pages_of_one(monkeypatch):
    case = Case(torch.float32, 16, 16, 1, 2, 8, (150,), 160, "plain", "per_head", top_p=0.9)
    inputs = make_inputs(case)
    outs = []
    for tile in (8192, 16):
        monkeypatch.setattr(launch_scoring, "_MAX_TILE", tile)
        outs.append(ops.sparse_decode(*inputs.sparse(), **inputs.settings()))
    assert torch.equal(*outs)
