"""Shapes of models that the cases of hostile.py leave out, small in everything else."""

import dataclasses

import pytest
import torch
from exact_scores import assert_scores
from hostile import Case, every_format, make_inputs, on_cpu
from test_attend_pages import assert_attends, listed_positions
from test_every_op import assert_same_bits, rows_of
from test_sparse_decode_step import assert_same_state, state_of, step

from quest_compile import ops
from quest_compile.ops import reference

# head_dim 96 and 16 query heads to a KV head; 64 rows, the last of them longer than their budget.
WIDE_GROUP = Case(torch.bfloat16, 96, 96, 1, 16, 16, (150, 77), 160, "tokens_first", "row")
LARGE_BATCH = Case(torch.bfloat16, 16, 16, 1, 2, 8, tuple(range(1, 65)), 64, "gaps")
shapes = pytest.mark.parametrize("case", [WIDE_GROUP, LARGE_BATCH], ids=["wide", "batch"])


@every_format
@shapes
def test_scores_pages_and_attention(case, page_format, device):
    inputs = make_inputs(dataclasses.replace(case, **page_format), device)
    scores = inputs.scores()
    assert_scores(inputs, scores)
    pages = inputs.pages(scores)
    limits = {"page_budget": case.budget_pages, "page_size": case.page_size}
    arguments = on_cpu(scores, inputs.seq_lens, inputs.attn_mask)
    assert torch.equal(pages.cpu(), reference.select_pages(*arguments, **limits))
    assert_attends(inputs, listed_positions(inputs, pages), *inputs.attend(pages))
    assert_attends(inputs, inputs.live[:, :, None], ops.dense_decode(*inputs.dense()))


@every_format
@shapes
def test_a_step_summarises_as_the_reference_and_attends_the_pages_selected(
    case, page_format, device
):
    inputs = make_inputs(dataclasses.replace(case, **page_format), device)
    position = torch.arange(case.max_seq_len, device=device)
    inputs.key_cache, state = inputs.clean_keys.to(case.dtype), state_of(inputs)
    arguments = on_cpu(inputs.key_cache, position, *state)
    reference.update_page_summary(*arguments, **inputs.case.page_format())
    out = step(inputs, position, state)
    assert_same_state(on_cpu(*state), arguments[2:])
    inputs.page_summary = state[0]
    pages = inputs.pages(inputs.scores())
    assert_attends(inputs, listed_positions(inputs, pages), out)


@pytest.mark.parametrize("row", [0, 40, 63])
def test_a_row_of_many_has_the_bits_that_it_has_alone(row, device):
    inputs = make_inputs(LARGE_BATCH, device)
    together = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    alone = rows_of(inputs, [row])
    out = ops.sparse_decode(*alone.sparse(), **alone.settings())
    assert_same_bits([out], [together[[row]]])
