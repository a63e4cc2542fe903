"""Shares of the context and of the softmax on the Triton kernels: as scaled_summaries.py,
small and collected by test_triton_interpreted.py alone."""

import pytest
import torch
from hostile import NAN, Case, make_inputs
from test_every_op import assert_same_bits
from test_sparse_decode_step import assert_same_state, step, two_calls

from quest_compile import ops
from quest_compile.ops import reference, reference_selection
from quest_compile.ops.triton import launch_selection

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHARES = (
    {"budget_fraction": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.5, "score_scale": 0.37, "budget_fraction": 0.41},
    {"top_p": 0.99, "score_scale": -1.0},
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
    [*((shares, 23, 8192) for shares in SHARES), (SHARES[2], 30, 16)],
)
def test_selects_the_pages_of_the_reference(shares, num_pages, tile, monkeypatch):
    """In one tile, and in two."""
    monkeypatch.setattr(launch_selection, "_MAX_TILE", tile)
    scores, lengths = make_scores(num_pages, num_pages), torch.tensor([num_pages * 8 - 3, 100])
    mask = torch.rand(2, 1, 1, num_pages * 8) < 0.2
    for page_budget, attn_mask in ((6, None), (num_pages, mask)):
        settings = {"page_budget": page_budget, "page_size": 8, **shares}
        actual = ops.select_pages(scores, lengths, attn_mask, **settings)
        assert torch.equal(actual, reference.select_pages(scores, lengths, attn_mask, **settings))


def test_rows_that_fit_are_those_with_few_pages():
    for fraction in (1e-3, 0.1, 0.3, 0.5, 0.9, 0.99, 1 - 2**-53, 1.0):
        for page_budget in (4, 7, 100, 1000):
            limits = {"num_sink_pages": 1, "num_recent_pages": 2, "budget_fraction": fraction}
            fitting = launch_selection.fitting_pages(page_budget, *limits.values())
            for n in range(1, page_budget + 3):
                most = reference_selection.page_budget_of(n, page_budget=page_budget, **limits)
                assert (n <= fitting) == (n <= most), (fraction, page_budget, n)


@pytest.mark.parametrize(
    ("summary", "shares"),
    [("minmax", {"top_p": 0.6}), ("sketch", {"top_p": 0.6}),
     ("minmax", {"budget_fraction": 0.5})],
)  # fmt: skip
def test_a_step_is_update_score_select_attend(summary, shares):
    """A row that does not fit, one that fits the share of its pages, and a mask per head."""
    mask = "per_head" if "top_p" in shares else "none"
    case = Case(torch.float16, 16, 16, 1, 2, 8, (90, 30), 96, mask, budget_pages=7)
    inputs = make_inputs(case)
    states = []
    for _ in range(2):
        rows, scale = ops.empty_page_summary(inputs.key_cache, 8, summary)
        states.append((rows.fill_(0), torch.tensor([0, 0]), scale))
    settings = {"summary": summary, **shares}
    position = inputs.seq_lens.max()[None] - 1
    out = step(inputs, position, states[0], **settings)
    assert_same_bits([out], [two_calls(inputs, position, states[1], **settings)])
    assert_same_state(*states)
    query, keys, values, _, lengths, attn_mask = inputs.sparse()
    rows, _, scale = states[0]
    of_tokens = {"attn_mask": attn_mask} if summary == "sketch" else {}
    kind = {"page_size": 8, "summary": summary}
    scores = ops.score_pages(query, rows, lengths, scale, **of_tokens, **kind)
    score_scale = reference_selection.score_scale_of(2, 16, summary=summary)
    choice = {"page_budget": 7, "page_size": 8, "score_scale": score_scale, **shares}
    pages = ops.select_pages(scores, lengths, attn_mask, **choice)
    composed, _ = ops.attend_pages(query, keys, values, pages, lengths, attn_mask, page_size=8)
    assert_same_bits([out[:1]], [composed[:1]])
    assert_same_bits([out[1:]], [ops.dense_decode(*inputs.dense())[1:]])
