"""Sparse steps by clusters of CTAs: the operator tests, and the bits of two kernels."""

# ruff: noqa: F401, F811, I001 - tests run where they are imported.
import dataclasses

import pytest
import torch
from emulated_library import configure
from hostile import CASES, Case, make_inputs
from test_every_op import CASES as FEW_CASES
from test_every_op import (
    assert_same_bits,
    test_rest_of_the_batch_changes_no_bit,
)
from test_minmax_int8 import test_sparse_decode_is_score_select_attend as test_int8_sparse_decode
from test_several_queries import make_call
from test_sparse_decode import (
    test_budget_that_holds_the_sequence_equals_dense_bit_for_bit,
    test_equals_score_select_attend,
    test_is_attention_over_the_best_pages,
    test_no_page_beyond_the_budget_is_read,
    test_nothing_to_attend_is_zero,
    test_open_page_is_always_attended,
    test_row_that_fits_is_dense_beside_rows_that_do_not,
    test_selects_as_the_reference_in_float64,
    test_the_key_that_matters_is_found,
)
from test_sparse_decode_step import (
    assert_same_state,
    state_of,
    step,
    test_is_update_and_sparse_decode_bit_for_bit,
    test_steps_one_after_the_other,
)
from test_emulated_kernels import test_lengths_and_positions_out_of_range_are_clamped

from quest_compile import ops

few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)
summaries = pytest.mark.parametrize("summary", ["minmax", "minmax_int8"])

SEVERAL_UNITS = Case(torch.bfloat16, lengths=(500,), max_seq_len=512, budget_pages=16)


@pytest.fixture(autouse=True)
def clusters(emulated):
    configure(8, form="cluster")


@pytest.fixture
def device(request):
    """Of the operator tests that run here too."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("summary") in ("sketch", "meanstd"):
        pytest.skip("sketches go to two kernels: see test_sketches_go_to_two_kernels")
    return "cpu"


def stepped(case, summary="minmax", **gpu):
    """Output and state of one step, and the number of launches."""
    inputs = make_inputs(case)
    state = state_of(inputs, summary)
    configure(**gpu)
    out = step(inputs, inputs.seq_lens.max()[None] - 1, state, summary=summary)
    return out, state, configure(8, form="cluster")


@summaries
@pytest.mark.parametrize("case", CASES, ids=str)
def test_has_the_bits_of_two_kernels(case, summary):
    expected, expected_state, num_launches = stepped(case, summary)
    assert num_launches == 2
    is_sparse = case.max_seq_len > case.budget_pages * case.page_size
    is_alone = case.group_reduce == "none" or case.mask == "per_head"
    num_works = case.group_size if is_alone else 1
    for num_sms in (4, 8, 16):
        out, state, num_launches = stepped(case, summary, num_sms=num_sms, form="cluster")
        assert num_launches == (1 if is_sparse and num_works <= num_sms else 2)
        assert_same_bits([out], [expected])
        assert_same_state(state, expected_state)


@few_cases
def test_order_of_warps_and_ctas_changes_no_bit(case):
    """A missing barrier would show."""
    expected, expected_state, _ = stepped(case)
    for seed in (1, 2, 3):
        out, state, _ = stepped(case, num_sms=8, form="cluster", seed=seed)
        assert_same_bits([out], [expected])
        assert_same_state(state, expected_state)


def assert_found(inputs, state, expected, missing):
    """That a barrier is missing: nothing else may hide it."""
    configure(8, form="cluster", missing_barrier=missing)
    try:
        out = step(inputs, inputs.seq_lens - 1, state, summary="minmax_int8")
    except RuntimeError as error:
        assert "has ended" in str(error) or "not all threads" in str(error)
        return
    with pytest.raises(AssertionError):
        assert_same_bits([out, *state], expected)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_emulation_finds_that_a_barrier_is_missing(missing):
    """After the scores, after attention, and before a CTA may end."""
    inputs = make_inputs(SEVERAL_UNITS)
    state, again = (state_of(inputs, "minmax_int8") for _ in range(2))
    out = step(inputs, inputs.seq_lens - 1, state, summary="minmax_int8")
    assert_found(inputs, again, [out, *state], missing)


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_emulation_finds_that_a_barrier_is_missing_behind_a_foreign_write(missing):
    """Besides those: after the vote on the samples, before they are repaired."""
    inputs = make_inputs(SEVERAL_UNITS)
    state = state_of(inputs, "minmax_int8", 0, -1)
    step(inputs, inputs.seq_lens - 1, state, summary="minmax_int8")
    inputs.key_cache[:, 1] *= -3
    again = [x.clone() for x in state]
    out = step(inputs, inputs.seq_lens - 1, state, summary="minmax_int8")
    assert_found(inputs, again, [out, *state], missing)


@summaries
@pytest.mark.parametrize("num_sms", [4, 16])
def test_the_last_cluster_writes_the_state(num_sms, summary):
    """Clusters that come late must not take the state of this step for that of the last one."""
    case = Case(torch.bfloat16, 64, 64, 4, 2, lengths=(300, 300, 300), max_seq_len=512)
    inputs = make_inputs(dataclasses.replace(case, lengths=(512, 512, 512)))
    state, expected = (state_of(inputs, summary, 0, 0) for _ in range(2))
    for seed, length in enumerate((300, 304, 305, 290, 512, 512)):
        inputs.seq_lens.fill_(length)
        position = torch.tensor([length - 1])
        configure(num_sms, seed=seed, form="cluster")
        out = step(inputs, position, state, summary=summary)
        assert configure(num_sms, seed=seed) == 1
        assert torch.equal(out, step(inputs, position, expected, summary=summary))
        assert_same_state(state, expected)


@pytest.mark.parametrize(
    ("num_sms", "num_rows", "num_launches"),
    [(132, 1, 2), (132, 3, 1), (132, 8, 1), (132, 16, 1), (132, 17, 2), (16, 1, 1), (15, 1, 1),
     (8, 1, 1), (7, 1, 2)],
)  # fmt: skip
def test_clusters_are_chosen_where_they_fill_the_gpu(num_sms, num_rows, num_launches):
    case = Case(torch.bfloat16, 64, 64, 2, 1, lengths=(100,) * num_rows)
    assert stepped(case, num_sms=num_sms, form="auto")[2] == num_launches


@pytest.mark.parametrize(
    ("case", "num_launches"),
    [
        (Case(torch.bfloat16, 8, 8, 1, 1, 8, (73_728,), 73_728), 1),
        (Case(torch.bfloat16, 8, 8, 1, 1, 8, (73_729,), 73_729), 2),
        (Case(torch.bfloat16, 8, 8, 1, 1, 8, (20_000,), 20_000, budget_pages=2049), 2),
        (Case(torch.bfloat16, 8, 8, 1, 9, group_reduce="none"), 2),
    ],
    ids=str,
)
def test_what_shared_memory_does_not_hold_goes_to_two_kernels(case, num_launches):
    inputs = make_inputs(case)
    outs = []
    for form in ("two_kernels", "cluster"):
        configure(8, form=form)
        outs.append(ops.sparse_decode(*inputs.sparse(), **inputs.settings()))
    assert configure() == num_launches
    assert_same_bits(outs[:1], outs[1:])


def test_several_queries_go_to_two_kernels():
    inputs = make_call(Case(torch.bfloat16, lengths=(300,), max_seq_len=320), 3)
    state = state_of(inputs, "minmax")
    configure(8, form="cluster")
    step(inputs, torch.tensor([297, 298, 299]), state)
    assert configure() == 2


def test_sketches_go_to_two_kernels():
    case = Case(torch.bfloat16, 16, 16, lengths=(100,))
    assert stepped(case, "sketch", num_sms=8, form="cluster")[2] == 2


def test_a_form_that_does_not_exist_is_an_error():
    with pytest.raises(RuntimeError, match="form: expected 'auto', 'two_kernels' or 'cluster'"):
        configure(form="three_kernels")
