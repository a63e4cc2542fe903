"""What is about GPUs: launches, CTAs, orders of execution, memory that is not ours."""

import pytest
import torch
from emulated_library import configure
from exact_scores import assert_scores
from hostile import WAYS, Case, every_case, every_format, every_way, make_inputs
from test_attend_pages import assert_attends, listed_positions
from test_every_op import CASES as FEW_CASES
from test_every_op import (  # noqa: F401
    assert_same_bits,
    call_of,
    results,
    rows_of,
    test_rest_of_the_batch_changes_no_bit,
    test_second_call_gives_the_same_bits_and_arguments_are_left_alone,
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

few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)


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


@every_case
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
    step(inputs, torch.tensor([297, 298, 299]), state_of(inputs))
    assert configure() == 2


@pytest.mark.parametrize("name", ["dense_decode", "attend_pages", "select_pages", "score_pages"])
def test_other_operators_are_one_launch(name):
    """But for the shares of a softmax."""
    for case in FEW_CASES[:2]:
        arguments, settings = call_of(name, make_inputs(case))
        configure(132)
        results(name, arguments, settings)
        has_shares = name == "score_pages" and case.group_reduce == "softmax"
        assert configure() == 1 + has_shares


@every_format
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_foreign_writes_are_repaired_whichever_cta_comes_first(seed, page_format):
    """CTAs that find out late must not see what others have repaired."""
    case = Case(torch.bfloat16, lengths=(500, 500), max_seq_len=512, **page_format)
    inputs = make_inputs(case)
    keys = inputs.key_cache
    position = inputs.seq_lens[:1] - 1
    state, expected = (state_of(inputs, 0, -1) for _ in range(2))
    configure(132, seed=seed)
    step(inputs, position, state)
    keys[1, 0] *= -3
    keys[0, 1, 30 * 16 : 31 * 16] += 5
    out = step(inputs, position + 1, state)
    assert torch.equal(out, step(inputs, position + 1, expected))
    rows, num_sealed = state
    assert num_sealed.tolist() == [31, -1]
    assert torch.equal(rows[:, :, :31], expected[0][:, :, :31])


@every_format
@pytest.mark.parametrize("num_sms", [4, 132])
def test_the_last_cta_writes_the_state(num_sms, page_format):
    """CTAs that come late must not take the state of this step for that of the last one."""
    sizes = {"lengths": (512, 512, 512), "max_seq_len": 512}
    inputs = make_inputs(Case(torch.bfloat16, 64, 64, 4, 2, **sizes, **page_format))
    state, expected = (state_of(inputs, 0, 0) for _ in range(2))
    for seed, length in enumerate((300, 304, 305, 290, 512, 512)):
        inputs.seq_lens.fill_(length)
        position = torch.tensor([length - 1])
        configure(num_sms, seed=seed)
        out = step(inputs, position, state)
        assert torch.equal(out, two_calls(inputs, position, expected))
        assert_same_state(state, expected)


@every_format
@pytest.mark.parametrize(
    ("dtype", "page_size", "layout"),
    [
        (torch.float32, 8, "gaps"),
        (torch.bfloat16, 24, "tokens_first"),
        (torch.float16, 64, "plain"),
    ],
)
def test_prefill_and_decode(dtype, page_size, layout, page_format):
    cache = Cache(dtype, page_size, layout, **page_format)
    cache.write(0, 100)
    for position in range(100, 140):
        cache.write(position, 1)
    cache.assert_up_to_date()


@pytest.mark.parametrize("wild", [-(2**40), -1, 0, 129, 2**40])
def test_lengths_and_positions_out_of_range_are_clamped(wild):
    """Nobody can look at them before the launch; memory must not be touched outside."""
    inputs = make_inputs(Case(torch.bfloat16, lengths=(100,), max_seq_len=128))
    rows, num_sealed = state_of(inputs)
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


# Rows of 16 bytes at a time, of a page at a time, and of 8.
SKETCHES = (
    Case(torch.float16, 80, 40, 2, 3, 24, (300, 90), 320, mask="per_head", **WAYS[1]),
    Case(torch.float32, 256, 64, 1, 4, 128, (1100,), 1200, mask="random", **WAYS[0]),
)


@pytest.mark.parametrize("case", [*SKETCHES, *FEW_CASES], ids=str)
def test_rows_at_any_address_give_the_same_bits(case):
    """Vectors of 16 bytes need addresses that are multiples of 16."""
    inputs = make_inputs(case)
    position = inputs.seq_lens.max()[None] - 1
    state = state_of(inputs)
    expected = (step(inputs, position, state), *state)
    inputs.key_cache, inputs.value_cache = map(moved, (inputs.key_cache, inputs.value_cache))
    state = tuple(map(moved, state_of(inputs)))
    configure(8, SMALL_GPU)
    assert_same_bits((step(inputs, position, state), *state), expected)


def moved(tensor):
    """To an address of one element behind a multiple of 16 bytes."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_groups_of_more_heads_than_a_tile(dtype, way):
    inputs = make_inputs(Case(dtype, 64, 64, 1, 20, lengths=(300,), max_seq_len=320, **way))
    scores = inputs.scores()
    assert_scores(inputs, scores)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    assert_attends(inputs, listed_positions(inputs, inputs.pages(scores)), out)


def test_more_heads_that_share_a_kv_head_than_their_softmax_takes():
    inputs = make_inputs(Case(torch.float16, 8, 8, 1, 129, lengths=(300,), max_seq_len=320))
    with pytest.raises(RuntimeError, match="group_reduce.*128.*129"):
        EMULATED.sparse_decode(*inputs.sparse(), **inputs.settings())


@pytest.mark.parametrize("way", [WAYS[0], WAYS[5]], ids=str)
def test_more_pages_and_longer_lists_than_shared_memory_holds(way):
    """Shares of heads stay in memory of their own, then."""
    case = Case(torch.bfloat16, 8, 8, 1, 2, 8, (80_000,), 80_000, budget_pages=2100, **way)
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
