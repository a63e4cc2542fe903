import dataclasses

import pytest
import torch
from hostile import NAN, Case, every_case, every_way, make_inputs
from oracle import exact_attention, in_float64
from test_attend_pages import assert_attends, listed_positions

from quest_compile import ops
from quest_compile.ops import reference

LONG = Case(torch.bfloat16, lengths=(500, 333, 64), max_seq_len=512)


SHARES = ({}, {"top_p": 0.9}, {"budget_fraction": 0.3}, {"top_p": 0.5, "budget_fraction": 0.7})


@every_case
def test_is_attention_over_the_best_pages(case, device):
    inputs = make_inputs(case, device)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    pages = inputs.pages(inputs.scores())
    assert_attends(inputs, listed_positions(inputs, pages), out)


@every_case
def test_equals_score_select_attend_or_dense_bit_for_bit(case):
    for shares in SHARES:
        budget_pages = 9 if shares else case.budget_pages
        inputs = make_inputs(dataclasses.replace(case, budget_pages=budget_pages, **shares))
        out = ops.sparse_decode(*inputs.sparse(), **inputs.settings(), scale=0.3)
        of_tokens = {"scale": 0.3} if case.scores_tokens else {}
        scores = inputs.scores(**of_tokens)
        composed, _ = inputs.attend(inputs.pages(scores, scale=0.3), scale=0.3)
        dense, fits = ops.dense_decode(*inputs.dense(), scale=0.3), inputs.fits()
        assert torch.equal(out[~fits], composed[~fits]), shares
        assert torch.equal(out[fits], dense[fits]), shares


@every_case
def test_reference_in_float64_is_exact(case):
    """The oracle itself, against attention over the pages that it selected."""
    inputs = make_inputs(case)
    out, ((_, pages, _),) = in_float64(
        reference.sparse_decode, *inputs.sparse(), **inputs.settings()
    )
    is_attended = inputs.live[:, :, None]
    if pages is not None:
        is_listed = listed_positions(inputs, pages)
        is_attended = torch.where(inputs.fits()[:, None, None, None], is_attended, is_listed)
    exact, _ = exact_attention(*inputs.clean(), is_attended)
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)


@every_case
def test_budget_that_holds_the_sequence_equals_dense_bit_for_bit(case, device):
    inputs = make_inputs(case, device)
    dense = ops.dense_decode(*inputs.dense())
    settings = {**inputs.settings(), "budget": 4096}
    assert torch.equal(ops.sparse_decode(*inputs.sparse(), **settings), dense)


@pytest.mark.parametrize("length", [1, 16, 63, 64])
@pytest.mark.parametrize("page_size", [8, 16])
def test_row_that_fits_is_dense_beside_rows_that_do_not(length, page_size, device):
    case = dataclasses.replace(
        LONG, lengths=(500, length), page_size=page_size, budget_pages=64 // page_size
    )
    inputs = make_inputs(case, device)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    assert torch.equal(out[1], ops.dense_decode(*inputs.dense())[1])


def test_long_row_that_fits_is_dense_beside_rows_that_do_not():
    """Dense results come in splits or tiles: they have to be the same ones."""
    inputs = make_inputs(Case(lengths=(3000, 1029, 2000), max_seq_len=3000))
    out = ops.sparse_decode(*inputs.sparse(), budget=2048)
    assert torch.equal(out[1:], ops.dense_decode(*inputs.dense())[1:])


@every_way
def test_no_page_beyond_the_budget_is_read(way, device):
    case = dataclasses.replace(LONG, **way)
    inputs = make_inputs(case, device)
    expected = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    pages = inputs.pages(inputs.scores()).unflatten(1, (2, -1)).flatten(2)
    assert pages.shape[2] <= 16
    for row in range(3):
        for head in range(2):
            chosen = pages[row, head].cpu()
            unread = ~torch.isin(torch.arange(32), chosen).repeat_interleave(16)
            for cache in (inputs.key_cache, inputs.value_cache):
                cache[row, head, unread] = NAN
    actual = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    assert actual.isfinite().all()
    assert torch.equal(actual, expected)


def test_never_attends_more_tokens_than_the_budget():
    inputs = make_inputs(LONG)
    for budget in (48, 63, 64, 100, 255):
        ops.reset_counters()
        ops.sparse_decode(*inputs.sparse(), budget=budget)
        assert 0 < ops.counters()["max_tokens_attended"] <= budget


@every_way
def test_the_key_that_matters_is_found(way):
    case = Case(lengths=(2000,), max_seq_len=2000, keys="normal", **way)
    inputs = make_inputs(case)
    position = 777
    # One direction for all heads of a group: they agree on what matters.
    inputs.query.copy_(
        inputs.query.unflatten(1, (2, 4))[:, :, :1].expand(-1, -1, 4, -1, -1).flatten(1, 2)
    )
    inputs.key_cache[0, :, position] = 8 * inputs.query[0, ::4, 0]
    inputs.summarise()
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    expected = inputs.value_cache[0, :, position].repeat_interleave(4, 0)
    torch.testing.assert_close(out[0, :, 0], expected, atol=1e-3, rtol=1e-3)


def test_open_page_is_always_attended():
    """Its keys are not in the summary: only attention can see them."""
    for length in (65, 79, 80, 81):
        inputs = make_inputs(Case(lengths=(length,)))
        settings = {"budget": 16, "num_sink_pages": 0, "num_recent_pages": 1}
        before = ops.sparse_decode(*inputs.sparse(), **settings)
        inputs.value_cache[:, :, length - 1] += 1
        assert (ops.sparse_decode(*inputs.sparse(), **settings) != before).any(-1).all()


def test_nothing_to_attend_is_zero():
    inputs = make_inputs(dataclasses.replace(LONG, mask="nothing"))
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    assert (out[0] == 0).all() and out[1:].isfinite().all()
