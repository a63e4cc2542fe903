"""Summaries with scales of channels on the Triton kernels: collected by test_triton_interpreted.py
alone, in a process of Triton's interpreter, and small for its sake."""

import pytest
import torch
from hostile import NAN, Case, make_inputs
from test_every_op import assert_same_bits
from test_sketch import SKETCHED, assert_scores_agree
from test_sparse_decode_step import assert_same_state, step, two_calls

from quest_compile import ops
from quest_compile.ops import reference

KINDS = (("sketch", 1), ("sketch", 2))
kinds = pytest.mark.parametrize(("summary", "bits"), KINDS)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
LENGTH, MAX_SEQ_LEN, HEAD_DIM, PAGE_SIZE = 130, 140, 24, 24


def make_keys(name, dtype, heads=1):
    torch.manual_seed(1)
    keys = SKETCHED[name]((1, heads, MAX_SEQ_LEN, HEAD_DIM)).to(dtype)
    return keys.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)


def updated(by, keys, summary, bits, position, state=None):
    if state is None:
        rows, scale = ops.empty_page_summary(keys, PAGE_SIZE, summary, bits)
        state = rows.fill_(255), torch.tensor([0, 0]), scale
    settings = {"page_size": PAGE_SIZE, "summary": summary, "sketch_bits": bits}
    by(keys, position, *state, **settings)
    return state


@kinds
def test_rows_and_scales_are_those_of_the_reference(summary, bits):
    """Of pages in the middle of a cache, with tokens that are not finite; other pages stay."""
    for i, name in enumerate(("denormal", "huge", "heavy_tails", "identical_in_pages")):
        keys = make_keys(name, (torch.float32, torch.bfloat16, torch.float16)[i % 3])
        if name == "heavy_tails":
            keys[0, 0, 30, 5], keys[0, 0, 31] = torch.inf, NAN
            keys[0, 0, 48:72, 3] = -torch.inf
        position = torch.arange(LENGTH)
        actual = updated(ops.update_page_summary, keys, summary, bits, position)
        expected = updated(reference.update_page_summary, keys, summary, bits, position)
        assert_same_state(actual, expected)


@kinds
def test_writes_one_after_the_other_give_the_states_of_the_reference(summary, bits):
    """The number of pages doubles, a foreign write is found, a step goes back."""
    keys = make_keys("changing", torch.bfloat16, 2)
    states = {}
    for first, last in ((0, 70), (70, 97), (97, 121), (100, 125)):
        if first == 97:
            keys[0, 1] += 3
        for by in (ops.update_page_summary, reference.update_page_summary):
            position = torch.arange(first, last)
            states[by] = updated(by, keys, summary, bits, position, states.get(by))
        assert_same_state(*states.values())


@pytest.mark.parametrize("mask_heads", [0, 6])
@pytest.mark.parametrize(("group_reduce", "bits"), [("sum", 1), ("max", 2), ("none", 1)])
def test_scores_of_sketches_are_those_of_the_reference(group_reduce, bits, mask_heads):
    keys = make_keys("heavy_channels", torch.bfloat16, 2).expand(2, -1, -1, -1).clone()
    keys[:, :, 50, 3] = NAN
    rows, _, scale = updated(
        reference.update_page_summary, keys, "sketch", bits, torch.arange(LENGTH)
    )
    query = torch.randn(2, 6, 1, HEAD_DIM).to(torch.bfloat16)
    query[1, 4, 0, 2] = torch.inf
    settings = {"group_reduce": group_reduce, "page_size": PAGE_SIZE, "lengths": (LENGTH, 70)}
    if mask_heads:
        mask = torch.rand(2, mask_heads, 1, MAX_SEQ_LEN) < 0.2
        mask[:, :, :, 72:96] = False
        mask[:, :, :, 50] = mask[:, :, :, 50] & (torch.arange(mask_heads) == 0)[:, None]
        settings |= {"attn_mask": mask, "scale": 0.1}
    assert_scores_agree(query, rows, scale, bits, **settings)


@kinds
def test_a_step_is_update_score_select_attend(summary, bits):
    """With a mask per head, over a row that fits the budget and one that does not."""
    case = Case(torch.float16, 16, 16, 1, 2, 8, (60, 20), 64, mask="per_head", budget_pages=3)
    inputs = make_inputs(case)
    settings = {"summary": summary, "sketch_bits": bits}
    states = [state_of_bits(inputs, summary, bits) for _ in range(2)]
    position = inputs.seq_lens.max()[None] - 1
    out = step(inputs, position, states[0], **settings)
    assert_same_bits([out], [two_calls(inputs, position, states[1], **settings)])
    assert_same_state(*states)
    query, keys, values, _, lengths, mask = inputs.sparse()
    rows, _, scale = states[0]
    kind = settings | {"page_size": 8}
    live = {"attn_mask": mask} if summary == "sketch" else {}
    scores = ops.score_pages(query, rows, lengths, scale, **kind, **live)
    pages = ops.select_pages(scores, lengths, mask, page_budget=3, page_size=8)
    expected, _ = ops.attend_pages(query, keys, values, pages, lengths, mask, page_size=8)
    assert_same_bits([out[:1]], [expected[:1]])


def state_of_bits(inputs, summary, bits):
    rows, scale = ops.empty_page_summary(inputs.key_cache, 8, summary, bits)
    return rows.fill_(0), torch.tensor([0, 0]), scale


def test_rows_need_no_alignment():
    """Rows of a view that begin anywhere."""
    keys = make_keys("normal", torch.float32)
    rows, sealed, scale = updated(ops.update_page_summary, keys, "sketch", 2, torch.arange(LENGTH))
    shape = (*rows.shape[:3], rows.shape[3] + 3)
    view = torch.zeros(shape, dtype=torch.uint8)[..., 1:-2]
    assert view.data_ptr() % 8 != 0
    other = updated(
        ops.update_page_summary, keys, "sketch", 2, torch.arange(LENGTH),
        (view, torch.tensor([0, 0]), torch.empty_like(scale))
    )  # fmt: skip
    num_pages = LENGTH // PAGE_SIZE
    assert torch.equal(view[:, :, :num_pages], rows[:, :, :num_pages])
    query = torch.randn(1, 2, 1, HEAD_DIM)
    settings = {"summary": "sketch", "sketch_bits": 2, "page_size": PAGE_SIZE}
    lengths = torch.tensor([LENGTH])
    assert torch.equal(other[1], sealed)
    assert_same_bits(
        [ops.score_pages(query, view, lengths, other[2], **settings)],
        [ops.score_pages(query, rows, lengths, scale, **settings)],
    )
