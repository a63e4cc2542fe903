import pytest
import torch
from hostile import Case, every_case, every_format, make_inputs
from test_several_queries import make_call

from quest_compile import ops


def state_of(inputs, num_sealed=0, next_position=None):
    """What an earlier step left: page_summary, num_sealed."""
    rows = ops.empty_page_summary(inputs.key_cache, **inputs.case.page_format()).zero_()
    sealed = [num_sealed] if next_position is None else [num_sealed, next_position]
    return rows, torch.tensor(sealed, device=rows.device)


def step(inputs, position, state):
    query, keys, values, _, *lengths = inputs.sparse()
    return ops.sparse_decode_step(
        query, keys, values, position, *state, *lengths, **inputs.settings()
    )


def two_calls(inputs, position, state):
    query, keys, values, _, *lengths = inputs.sparse()
    ops.update_page_summary(keys, position, *state, **inputs.case.page_format())
    return ops.sparse_decode(query, keys, values, state[0], *lengths, **inputs.settings())


def assert_same_state(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@every_case
def test_is_update_and_sparse_decode_bit_for_bit(case, device):
    inputs = make_inputs(case, device)
    position = inputs.seq_lens.max()[None] - 1
    state, expected_state = (state_of(inputs) for _ in range(2))
    out = step(inputs, position, state)
    assert torch.equal(out, two_calls(inputs, position, expected_state))
    assert_same_state(state, expected_state)


@every_format
@pytest.mark.parametrize("num_queries", [1, 3])
def test_steps_one_after_the_other(num_queries, page_format, device):
    """Pages are sealed on the way, once a write does not continue the last one, and once somebody
    else writes."""
    case = Case(torch.bfloat16, lengths=(300, 300), max_seq_len=320, **page_format)
    state = expected_state = None
    for i, length in enumerate((250, 256, 257, 272, 273, 270, 300)):
        inputs = make_call(case, num_queries, device=device)
        inputs.seq_lens = torch.full_like(inputs.seq_lens, length)
        if state is None:
            state, expected_state = (state_of(inputs, 0, 0) for _ in range(2))
        if i == 4:
            inputs.key_cache[1, 1] += 1
        position = torch.arange(length - num_queries, length, device=inputs.query.device)
        out = step(inputs, position, state)
        assert torch.equal(out, two_calls(inputs, position, expected_state))
        assert_same_state(state, expected_state)


def test_counts_both():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(300,), max_seq_len=320))
    ops.reset_counters()
    step(inputs, torch.tensor([299]), state_of(inputs))
    counts = ops.counters()
    assert counts["update_calls"] == counts["sparse_calls"] == 1
    assert counts["pages_sealed"] == 18 * 2
    assert counts["sparse_rows"] == 8 and counts["max_tokens_attended"] <= 64
