"""Summaries of both kinds on the Triton kernels: collected by test_triton_interpreted.py alone, in
a process of Triton's interpreter, and small for its sake."""

import pytest
import torch
from exact_scores import assert_scores
from hostile import NAN, WAYS, Case, every_format, every_way, make_inputs
from key_distributions import make_keys

from quest_compile import ops
from quest_compile.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# What the kernels of a kind have to tell apart.
CHOSEN_WAYS = [way for way in WAYS if way["sketch_bits"] == 2]
some_ways = pytest.mark.parametrize(
    "way", CHOSEN_WAYS, ids=lambda way: "-".join(map(str, way.values()))
)
LENGTH, MAX_SEQ_LEN, HEAD_DIM, PAGE_SIZE = 58, 64, 24, 24


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def new_state(keys, page_format):
    return ops.empty_page_summary(keys, **page_format).fill_(77), torch.tensor([0, 0])


@every_format
@pytest.mark.parametrize("keys", ["denormal", "huge", "heavy_tails"])
def test_rows_are_those_of_the_reference(page_format, keys):
    """With tokens that are not finite; pages that are not complete stay as they are."""
    dtype = {"denormal": torch.float32, "huge": torch.bfloat16, "heavy_tails": torch.float16}[keys]
    keys = make_keys(keys, (1, 1, MAX_SEQ_LEN, HEAD_DIM), dtype)
    keys[0, 0, 30, 5], keys[0, 0, 31, 0] = torch.inf, -torch.inf
    if page_format["summary"] == "sketch":
        keys[0, 0, 33] = NAN
    page_format = {"page_size": PAGE_SIZE, **page_format}
    states = [new_state(keys, page_format) for _ in range(2)]
    for by, state in zip((ops, reference), states, strict=True):
        by.update_page_summary(keys, torch.arange(LENGTH), *state, **page_format)
    assert all(map(same_bits, *states))


@pytest.mark.parametrize("summary", ["minmax", "sketch"])
def test_writes_one_after_the_other_give_the_states_of_the_reference(summary):
    """A foreign write is found in one head, and a step that goes back."""
    page_format = {"page_size": 8, "summary": summary}
    keys = make_keys("changing", (1, 2, MAX_SEQ_LEN, 8), torch.bfloat16)
    states = [new_state(keys, page_format) for _ in range(2)]
    for first, last in ((0, 30), (30, 33), (33, 41), (35, 50)):
        if first == 33:
            keys[0, 1] += 3
        for by, state in zip((ops, reference), states, strict=True):
            by.update_page_summary(keys, torch.arange(first, last), *state, **page_format)
        assert all(map(same_bits, *states))


@every_way
@pytest.mark.parametrize("mask", ["none", "per_head"])
def test_scores_are_what_they_are_defined_as(way, mask):
    """Of a page that nobody attends, of a key and of a query that are not numbers, too."""
    case = Case(torch.bfloat16, 24, 8, 2, 3, 8, (40, 30), 40, mask=mask, **way)
    inputs = make_inputs(case)
    if mask != "none":
        inputs.attn_mask[:, :, :, 16:24] = False
    inputs.key_cache = inputs.clean_keys.to(case.dtype)
    inputs.key_cache[0, 0, 3, 5] = NAN
    inputs.query[0, 4, 0, 2] = torch.inf if way["summary"] == "sketch" else NAN
    inputs.summarise()
    assert_scores(inputs, inputs.scores())
    if case.scores_tokens:
        assert_scores(inputs, inputs.scores(scale=-0.3), -0.3)


@some_ways
def test_a_step_is_update_score_select_attend(way):
    """With a mask per head, over a row that fits the budget and one that does not; in a head that
    somebody else wrote, too."""
    case = Case(torch.float16, 16, 16, 2, 2, 8, (60, 20), MAX_SEQ_LEN, mask="per_head", **way,
                budget_pages=3, top_p=0.8)  # fmt: skip
    inputs = make_inputs(case)
    query, keys, values, _, lengths, mask = inputs.sparse()
    position, page_format = inputs.seq_lens.max()[None] - 1, case.page_format()
    states = [new_state(keys, page_format) for _ in range(2)]
    for state in states:
        ops.update_page_summary(keys, torch.arange(40), *state, **page_format)
    keys[0, 1, :40] *= 2
    out = ops.sparse_decode_step(
        query, keys, values, position, *states[0], lengths, mask, **inputs.settings()
    )
    ops.update_page_summary(keys, position, *states[1], **page_format)
    assert all(map(same_bits, *states))
    rows = inputs.page_summary = states[1][0]
    assert torch.equal(
        out, ops.sparse_decode(query, keys, values, rows, lengths, mask, **inputs.settings())
    )
    composed, _ = inputs.attend(inputs.pages(inputs.scores()))
    assert torch.equal(out[:1], composed[:1])
    assert torch.equal(out[1:], ops.dense_decode(*inputs.dense())[1:])


@some_ways
def test_several_queries_are_one_after_the_other(way):
    """They seal a page as well."""
    case = Case(torch.float32, 16, 16, 1, 2, 8, (50,), 56, **way, budget_pages=4)
    inputs = make_inputs(case)
    query = torch.randn(1, 2, 3, 16)
    _, keys, values, _, lengths, _ = inputs.sparse()
    state = new_state(keys, case.page_format())
    ops.update_page_summary(keys, torch.arange(40), *state, **case.page_format())
    position = torch.arange(47, 50)
    out = ops.sparse_decode_step(
        query, keys, values, position, *state, lengths, None, **inputs.settings()
    )
    for i in range(3):
        one = ops.sparse_decode(
            query[:, :, i : i + 1], keys, values, inputs.page_summary, lengths - 2 + i, None,
            **inputs.settings(),
        )  # fmt: skip
        torch.testing.assert_close(out[:, :, i : i + 1], one)


def test_rows_need_no_alignment():
    """Rows of a view that begin anywhere."""
    page_format = {"page_size": PAGE_SIZE, "summary": "sketch", "sketch_bits": 2}
    keys = make_keys("normal", (1, 1, MAX_SEQ_LEN, HEAD_DIM))
    rows, sealed = new_state(keys, page_format)
    ops.update_page_summary(keys, torch.arange(LENGTH), rows, sealed, **page_format)
    shape = (*rows.shape[:3], rows.shape[3] + 3)
    view = torch.full(shape, 77, dtype=torch.uint8)[..., 1:-2]
    assert view.data_ptr() % 2 != 0
    ops.update_page_summary(keys, torch.arange(LENGTH), view, torch.tensor([0, 0]), **page_format)
    assert torch.equal(view, rows)
    query, lengths = torch.randn(1, 2, 1, HEAD_DIM), torch.tensor([LENGTH])
    settings = {"group_reduce": "softmax", **page_format}
    scores = [ops.score_pages(query, x, lengths, **settings) for x in (rows, view)]
    assert same_bits(*scores)
