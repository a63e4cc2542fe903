"""quest::recorded_decode is sparse_decode, and keeps the pages that it attended."""

import dataclasses

import pytest
import torch
from hostile import CASES, Case, make_inputs
from test_several_queries import make_call

from quest_compile import ops

LONG = Case(torch.bfloat16, lengths=(500, 333, 64), max_seq_len=512)


def record(inputs, max_q_len=1, **changed):
    settings = inputs.settings() | changed
    selection = ops.Selection.take(dict(settings))
    tensors = (inputs.query, inputs.key_cache, selection, inputs.case.page_size)
    recording = ops.new_recording(max_q_len, *tensors)
    ops.reset_counters()
    out = torch.ops.quest.recorded_decode(*inputs.sparse(), recording, **settings)
    return out, recording, ops.counters()


@pytest.mark.parametrize("case", (LONG, *CASES), ids=str)
def test_it_is_sparse_decode_with_the_selected_pages(case):
    inputs = make_inputs(case)
    out, recording, counted = record(inputs)
    assert torch.equal(recording[0], inputs.pages(inputs.scores()))
    ops.reset_counters()
    expected = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    # A row that fits attends as many positions by another sum.
    is_sparse = ~inputs.fits().reshape(-1).expand(len(out))
    assert torch.equal(out[is_sparse], expected[is_sparse])
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert out.stride() == expected.stride()
    assert counted == ops.counters()


@pytest.mark.parametrize("mask", ["none", "padded"])
def test_of_several_queries_each_has_pages_of_its_own(mask):
    inputs = make_call(LONG, 4, mask)
    out, recording, _ = record(inputs, max_q_len=6)
    torch.testing.assert_close(
        out, ops.sparse_decode(*inputs.sparse(), **inputs.settings()), rtol=2e-2, atol=2e-2
    )
    assert (recording[4:] == -1).all()
    assert len({str(pages.tolist()) for pages in recording[:4]}) == 4


def test_what_was_recorded_before_is_gone():
    inputs = make_inputs(LONG)
    _, few, _ = record(inputs)
    recording = torch.full_like(few, 7)
    torch.ops.quest.recorded_decode(*inputs.sparse(), recording, **inputs.settings())
    assert torch.equal(recording, few)


def test_opcheck():
    inputs = make_inputs(dataclasses.replace(LONG, dtype=torch.float32))
    _, recording, _ = record(inputs)
    arguments = (*inputs.sparse(), recording)
    op = torch.ops.quest.recorded_decode.default
    torch.library.opcheck(op, arguments, inputs.settings())


@pytest.mark.parametrize("wrong", [slice(0, 0), (slice(None), slice(0, 1)), (..., slice(0, 1))])
def test_a_recording_that_does_not_fit_is_an_error(wrong):
    inputs = make_inputs(LONG)
    _, recording, _ = record(inputs)
    with pytest.raises(ValueError, match="recording"):
        torch.ops.quest.recorded_decode(
            *inputs.sparse(), recording[wrong].contiguous(), **inputs.settings()
        )
