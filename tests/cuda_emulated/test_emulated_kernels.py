"""What is about GPUs: launches, CTAs, orders of execution, memory that is not ours."""

import dataclasses

import pytest
import torch
from emulated_library import configure
from hostile import CASES, Case, make_inputs
from test_attend_pages import assert_attends, listed_positions
from test_every_op import CASES as FEW_CASES
from test_every_op import (  # noqa: F401
    assert_same_bits,
    call_of,
    results,
    rows_of,
    test_arguments_are_left_alone,
    test_rest_of_the_batch_changes_no_bit,
)
from test_several_queries import CASES as SEVERAL_CASES
from test_several_queries import every_mask, make_call, run, run_alone
from test_sparse_decode_step import assert_same_state, state_of, step, two_calls
from test_update_page_summary import Cache

from quest_compile import ops
from quest_compile.ops import reference

EMULATED = torch.ops.quest_emulated
ATTENTION = ("attend_pages", "sparse_decode", "sparse_decode_step", "dense_decode")
SMALL_GPU = 99 << 10

cases = pytest.mark.parametrize("case", CASES, ids=str)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)
each_summary = pytest.mark.parametrize("summary", ["minmax", "sketch"])


@pytest.mark.parametrize("name", ATTENTION)
@few_cases
def test_number_of_sms_changes_no_bit(name, case):
    arguments, settings = call_of(name, make_inputs(case))
    expected = results(name, arguments, settings)
    for num_sms in (1, 7, 132, 1000):
        configure(num_sms)
        assert_same_bits(results(name, arguments, settings), expected)


@pytest.mark.parametrize("name", ATTENTION)
@few_cases
def test_order_of_warps_and_ctas_changes_no_bit(name, case):
    """A missing barrier would show."""
    arguments, settings = call_of(name, make_inputs(case))
    expected = results(name, arguments, settings)
    for seed in (1, 2, 3):
        configure(132, seed=seed)
        assert_same_bits(results(name, arguments, settings), expected)


@cases
def test_a_gpu_with_little_shared_memory_gives_the_same_bits(case):
    inputs = make_inputs(case)
    expected = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    configure(4, SMALL_GPU)
    assert torch.equal(ops.sparse_decode(*inputs.sparse(), **inputs.settings()), expected)


@pytest.mark.parametrize("name", ["sparse_decode", "sparse_decode_step"])
def test_a_sparse_step_is_two_launches(name):
    arguments, settings = call_of(name, make_inputs(FEW_CASES[0]))
    configure(132)
    results(name, arguments, settings)
    assert configure() == 2


def test_a_sparse_step_of_several_queries_is_two_launches_as_well():
    inputs = make_call(Case(torch.bfloat16, lengths=(300,), max_seq_len=320), 3)
    configure(132)
    step(inputs, torch.tensor([297, 298, 299]), state_of(inputs, "minmax"))
    assert configure() == 2


@pytest.mark.parametrize("name", ["dense_decode", "attend_pages", "select_pages", "score_pages"])
def test_other_operators_are_one_launch(name):
    arguments, settings = call_of(name, make_inputs(FEW_CASES[0]))
    configure(132)
    results(name, arguments, settings)
    assert configure() == 1


@each_summary
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_foreign_writes_are_repaired_whichever_cta_comes_first(seed, summary):
    """CTAs that find out late must not see what others have repaired."""
    case = Case(torch.bfloat16, lengths=(500, 500), max_seq_len=512)
    inputs = make_inputs(case)
    keys = inputs.key_cache
    position = inputs.seq_lens[:1] - 1
    state, expected = (state_of(inputs, summary, 0, -1) for _ in range(2))
    configure(132, seed=seed)
    step(inputs, position, state, summary=summary)
    keys[1, 0] *= -3
    keys[0, 1, 30 * 16 : 31 * 16] += 5
    out = step(inputs, position + 1, state, summary=summary)
    assert torch.equal(out, step(inputs, position + 1, expected, summary=summary))
    expected_rows, _, expected_scale = expected
    rows, num_sealed, scale = state
    assert num_sealed.tolist() == [31, -1]
    assert_same_state((rows[:, :, :31], scale), (expected_rows[:, :, :31], expected_scale))


@each_summary
@pytest.mark.parametrize("num_sms", [4, 132])
def test_the_last_cta_writes_the_state(num_sms, summary):
    """CTAs that come late must not take the state of this step for that of the last one."""
    case = Case(torch.bfloat16, 64, 64, 4, 2, lengths=(512, 512, 512), max_seq_len=512)
    inputs = make_inputs(case)
    state, expected = (state_of(inputs, summary, 0, 0) for _ in range(2))
    for seed, length in enumerate((300, 304, 305, 290, 512, 512)):
        inputs.seq_lens.fill_(length)
        position = torch.tensor([length - 1])
        configure(num_sms, seed=seed)
        out = step(inputs, position, state, summary=summary)
        assert torch.equal(out, two_calls(inputs, position, expected, summary=summary))
        assert_same_state(state, expected)


@pytest.mark.parametrize(
    ("dtype", "page_size", "layout"),
    [
        (torch.float32, 8, "gaps"),
        (torch.bfloat16, 24, "tokens_first"),
        (torch.float16, 64, "plain"),
    ],
)
def test_prefill_and_decode(dtype, page_size, layout):
    cache = Cache(dtype, page_size, layout)
    cache.write(0, 100)
    for position in range(100, 140):
        cache.write(position, 1)
    cache.assert_up_to_date()


def test_summaries_are_those_of_the_reference():
    inputs = make_inputs(Case(torch.float16, 80, 80, lengths=(333, 333), max_seq_len=400))
    state, expected = (state_of(inputs, "minmax", 0, 333) for _ in range(2))
    position = torch.arange(333)
    ops.update_page_summary(inputs.key_cache, position, *state[:2])
    reference.update_page_summary(inputs.key_cache, position, *expected[:2])
    assert_same_state(state, expected)


@pytest.mark.parametrize("wild", [-(2**40), -1, 0, 129, 2**40])
def test_lengths_and_positions_out_of_range_are_clamped(wild):
    """Nobody can look at them before the launch; memory must not be touched outside."""
    inputs = make_inputs(Case(torch.bfloat16, lengths=(100,), max_seq_len=128))
    rows, num_sealed, _ = state_of(inputs, "minmax")
    query, keys, values, _, lengths, _ = inputs.sparse()
    keys.nan_to_num_(0)
    values.nan_to_num_(0)
    position, num_sealed[0] = torch.tensor([wild]), min(wild, 2**40)
    outs = []
    for length in (wild, min(max(wild, 1), 128)):
        arguments = (rows.clone(), num_sealed.clone(), torch.tensor([length]))
        outs.append(
            EMULATED.sparse_decode_step(query, keys, values, position, *arguments, budget=64)
        )
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_any_address_give_the_same_bits(dtype):
    """Vectors of 16 bytes need addresses that are multiples of 16."""
    case = Case(dtype, 72, 40, 2, 3, lengths=(300, 90), max_seq_len=320)
    inputs = make_inputs(case)
    expected = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    for name in ("key_cache", "value_cache", "page_summary"):
        tensor = getattr(inputs, name)
        memory = tensor.new_empty(tensor.numel() + 1)
        moved = memory[1:].view(tensor.shape).copy_(tensor)
        shifted = dataclasses.replace(inputs, **{name: moved})
        assert torch.equal(ops.sparse_decode(*shifted.sparse(), **inputs.settings()), expected)


@pytest.mark.parametrize("group_reduce", ["sum", "max", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_groups_of_more_heads_than_a_tile(dtype, group_reduce):
    case = Case(dtype, 64, 64, 1, 20, lengths=(300,), max_seq_len=320, group_reduce=group_reduce)
    inputs = make_inputs(case)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    assert_attends(inputs, listed_positions(inputs, inputs.pages(inputs.scores())), out)


def test_more_pages_and_longer_lists_than_shared_memory_holds():
    case = Case(torch.bfloat16, 8, 8, 1, 1, 8, (70_000,), 70_000, budget_pages=2100)
    inputs = make_inputs(case)
    configure(132)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    scores = inputs.scores()
    settings = {"page_budget": 2100, "page_size": 8}
    expected = reference.select_pages(scores, inputs.seq_lens, **settings)
    assert torch.equal(inputs.pages(scores), expected)
    assert_attends(inputs, listed_positions(inputs, expected), out)


@pytest.mark.parametrize("case", SEVERAL_CASES[:3], ids=str)
@every_mask
def test_each_query_has_the_bits_of_a_call_of_its_own(mask, case):
    inputs = make_call(case, 3, mask)
    for name in ("dense_decode", "sparse_decode"):
        alone = [run_alone(name, inputs, i) for i in range(3)]
        assert torch.equal(run(name, inputs), torch.cat(alone, 2))
