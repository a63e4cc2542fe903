"""Means, shares of the context and of the softmax on the Triton kernels: as scaled_summaries.py,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_means_have_the_states_and_scores_of_the_reference(dtype):
    """Page by page, over a foreign write, with keys that are not finite and some too large."""
    keys = torch.randn(2, 2, 76, 24) * torch.randn(24).exp() * 3 + 1
    keys = keys.to(dtype)
    keys[0, 0, 30, 3], keys[0, 1, 60, 2], keys[1, 0, :24] = NAN, torch.inf, 7.7
    keys[1, 1, 8:16, 4] = torch.finfo(dtype).max
    states = {}
    for by in (ops.update_page_summary, reference.update_page_summary):
        states[by] = torch.zeros(2, 2, 4, 2, 24, dtype=dtype), torch.tensor([0, 0])
    for first, last in ((0, 50), (50, 51), (51, 76)):
        if first == 50:
            keys[1, 0] += 2
        for by, state in states.items():
            by(keys, torch.arange(first, last), *state, page_size=24, summary="meanstd")
        assert_same_state(*states.values())
    query, rows = torch.randn(2, 4, 1, 24).to(dtype), states[ops.update_page_summary][0]
    for group_reduce in ("sum", "max", "none"):
        arguments = (query, rows, torch.tensor([76, 50]))
        settings = {"page_size": 24, "group_reduce": group_reduce, "summary": "meanstd"}
        actual, expected = (x.score_pages(*arguments, **settings) for x in (ops, reference))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("summary", "shares"),
    [("meanstd", {"top_p": 0.6}), ("minmax_int8", {"top_p": 0.6}),
     ("meanstd", {"budget_fraction": 0.5})],
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
    scores = ops.score_pages(query, rows, lengths, scale, page_size=8, summary=summary)
    choice = {"page_budget": 7, "page_size": 8, "score_scale": 16**-0.5 / 2, **shares}
    pages = ops.select_pages(scores, lengths, attn_mask, **choice)
    composed, _ = ops.attend_pages(query, keys, values, pages, lengths, attn_mask, page_size=8)
    assert_same_bits([out[:1]], [composed[:1]])
    assert_same_bits([out[1:]], [ops.dense_decode(*inputs.dense())[1:]])
