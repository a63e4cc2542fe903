"""group_reduce="softmax": a score is the sum, over the heads of a group, of each head's share."""

import math

import pytest
import torch
from exact_scores import assert_scores
from hostile import NAN, Case, every_format, make_inputs

from quest_compile import ops
from quest_compile.ops import reference

INF = float("inf")


def shares_by_loop(logits):
    """The definition: logits [G, P] as lists, -inf for a page that does not count for the head."""
    total = [-INF] * len(logits[0])
    for head in logits:
        numbers = [x for x in head if x == x]
        best = max(numbers, default=-INF)
        weight = [0.0 if x == -INF else 1.0 if x == best else math.exp(x - best) for x in head]
        norm = sum(w for w in weight if w == w)
        for page, w in enumerate(weight):
            if head[page] != -INF:
                total[page] = max(total[page], 0.0) + (w / norm if w == w else NAN)
    return [NAN if any(head[p] != head[p] for head in logits) else x for p, x in enumerate(total)]


def inputs_of_logits(logits, **settings):
    """Inputs whose pages all hold one key: channel g of page p is logits[g, p], query g is one
    there, and the scale is one."""
    group_size, num_pages = logits.shape
    length = num_pages * 16
    case = Case(
        head_dim=16, num_kv_heads=1, group_size=group_size, lengths=(length,), max_seq_len=length,
        **settings
    )  # fmt: skip
    inputs = make_inputs(case)
    inputs.key_cache.zero_()
    inputs.key_cache[0, 0, :, :group_size] = logits.mT.repeat_interleave(16, 0)
    inputs.query.copy_(torch.eye(group_size, 16)[None, :, None])
    inputs.summarise()
    return inputs


def test_shares_are_those_of_the_definition():
    logits = torch.randn(2, 3, 4, 40) * 3
    logits[0, 0, 1, ::5], logits[0, 0, :, 7], logits[0, 1, 2] = -INF, -INF, -INF
    logits[0, 2, 0, 3], logits[1, 0, 1, 4:9], logits[1, 1, 3] = NAN, INF, NAN
    logits[1, 1, 0, 5], logits[1, 2, 1] = -INF, 1e30 * torch.randn(40)
    for dtype in (torch.float32, torch.float64):
        actual = reference.scores.shares(logits.to(dtype))
        expected = [[shares_by_loop(group) for group in row] for row in logits.tolist()]
        torch.testing.assert_close(
            actual.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-7, equal_nan=True
        )


@every_format
def test_shares_sum_to_the_number_of_heads_that_count(page_format):
    case = Case(torch.bfloat16, lengths=(320, 100), max_seq_len=330, mask="per_head", **page_format)
    inputs = make_inputs(case)
    inputs.attn_mask[0, 2] = False  # Attends nothing.
    inputs.attn_mask[1, 5:, :, :96] = False  # Three that attend the open page alone.
    scores = inputs.scores()
    assert_scores(inputs, scores)
    total = scores.clamp(min=0).sum(-1)
    torch.testing.assert_close(total, torch.tensor([[3.0, 4.0], [4.0, 1.0]]), rtol=1e-5, atol=0)


@every_format
def test_pages_that_count_for_no_head_are_minus_infinity_and_those_of_some_are_not(page_format):
    inputs = make_inputs(Case(lengths=(170,), max_seq_len=180, **page_format))
    mask = torch.ones(1, 8, 1, 180, dtype=torch.bool)
    mask[..., 32:48] = False
    mask[:, :4, :, 64:80] = False
    mask[:, 1, :, 70] = True
    inputs.attn_mask = mask
    scores = inputs.scores()
    assert_scores(inputs, scores)
    assert scores.isneginf().nonzero().tolist() == [[0, h, p] for h in (0, 1) for p in (2, 10, 11)]


@every_format
def test_a_page_that_one_head_wants_is_found(page_format):
    """And is not by the sum, in which the large logits of the other heads decide."""
    logits = torch.randn(4, 60) * 8
    logits[0] = torch.randn(60) * 0.1
    logits[0, 37] = 6
    logits[1:, 37] = -8

    def is_found(**settings):
        inputs = inputs_of_logits(logits, budget_pages=12, **settings)
        return bool((inputs.pages(inputs.scores(**one(inputs))) == 37).any())

    def one(inputs):
        return {"scale": 1.0} if inputs.case.scores_tokens else {}

    assert is_found(**page_format)
    assert not is_found(summary="minmax", group_reduce="sum")


@every_format
def test_a_page_that_is_nan_for_one_head_is_nan_and_takes_nothing_from_the_others(page_format):
    """One token of page 3 is NaN, which the mask allows the first head alone: a sketch has it
    apart, bounds of its page are NaN for all heads."""
    logits = torch.randn(2, 10)
    inputs = inputs_of_logits(logits, **page_format)
    inputs.key_cache[0, 0, 50] = NAN
    inputs.summarise()
    inputs.attn_mask = torch.ones(1, 2, 1, 160, dtype=torch.bool)
    inputs.attn_mask[0, 1, 0, 50] = False
    scores = inputs.scores(scale=1.0)
    assert_scores(inputs, scores, 1.0)
    assert scores.isnan().nonzero().tolist() == [[0, 0, 3]]
    total = scores.nansum()
    is_apart = page_format["summary"] == "sketch"
    assert (1.5 < total < 1.999) if is_apart else total == pytest.approx(2)
    pages = ops.select_pages(scores, inputs.seq_lens, page_budget=4, score_scale=None)
    assert 3 in pages[0, 0]


@every_format
def test_far_below_the_best_is_zero_and_ties_share(page_format):
    logits = torch.zeros(2, 12)
    logits[0, 3:5], logits[1, 7] = 1000, 1000
    scores = inputs_of_logits(logits, **page_format).scores(scale=1.0)[0, 0]
    expected = torch.zeros(12)
    expected[3:5], expected[7] = 0.5, 1
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def test_infinite_bounds_share_equally():
    inputs = inputs_of_logits(torch.rand(2, 12), summary="minmax")
    inputs.query.fill_(1)
    inputs.page_summary[0, 0, [2, 9], 1, 0] = INF
    expected = torch.zeros(12)
    expected[[2, 9]] = 1
    assert torch.equal(inputs.scores()[0, 0], expected)


@every_format
def test_top_p_keeps_the_smallest_set_with_that_part_of_the_shares(page_format):
    case = Case(lengths=(1600,), max_seq_len=1600, budget_pages=100, **page_format)
    scores = make_inputs(case).scores()
    weights = scores[0, 0, 1:98].double()
    for top_p in (0.5, 0.9, 0.95):
        wanted = top_p * weights.sum()
        pages = ops.select_pages(
            scores, torch.tensor([1600]), page_budget=100, top_p=top_p, score_scale=None
        )[0, 0]
        kept = weights[pages[(pages > 0) & (pages < 98)] - 1]
        assert kept.sum() >= wanted - 1e-4 and kept.sum() - kept.min() < wanted
