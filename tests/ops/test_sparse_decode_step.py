import pytest
import torch
from hostile import CASES, Case, make_inputs
from test_several_queries import make_call

from quest_compile import ops


def state_of(inputs, summary, num_sealed=0, next_position=None):
    """What an earlier step left: page_summary, num_sealed, channel_scale."""
    rows, scale = ops.empty_page_summary(inputs.key_cache, inputs.case.page_size, summary)
    rows.fill_(0)
    sealed = [num_sealed] if next_position is None else [num_sealed, next_position]
    return rows, torch.tensor(sealed, device=rows.device), scale


def step(inputs, position, state, **settings):
    rows, num_sealed, scale = state
    query, keys, values, _, lengths, mask = inputs.sparse()
    settings = {**inputs.settings(), **settings}
    return ops.sparse_decode_step(
        query, keys, values, position, rows, num_sealed, lengths, mask, scale, **settings
    )


def two_calls(inputs, position, state, **settings):
    rows, num_sealed, scale = state
    query, keys, values, _, lengths, mask = inputs.sparse()
    settings = {**inputs.settings(), **settings}
    names = ("page_size", "summary", "sketch_bits")
    shared = {key: settings[key] for key in names if key in settings}
    ops.update_page_summary(keys, position, rows, num_sealed, scale, **shared)
    return ops.sparse_decode(query, keys, values, rows, lengths, mask, scale, **settings)


def assert_same_state(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("summary", ["minmax", "sketch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_update_and_sparse_decode_bit_for_bit(case, summary, device):
    inputs = make_inputs(case, device)
    position = inputs.seq_lens.max()[None] - 1
    state, expected_state = (state_of(inputs, summary) for _ in range(2))
    out = step(inputs, position, state, summary=summary)
    expected = two_calls(inputs, position, expected_state, summary=summary)
    assert torch.equal(out, expected)
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("summary", ["minmax", "sketch"])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_steps_one_after_the_other(num_queries, summary, device):
    """Pages are sealed on the way, once a write does not continue the last one, and once somebody
    else writes."""
    case = Case(torch.bfloat16, lengths=(300, 300), max_seq_len=320)
    state = expected_state = None
    for i, length in enumerate((250, 256, 257, 272, 273, 270, 300)):
        inputs = make_call(case, num_queries, device=device)
        inputs.seq_lens = torch.full_like(inputs.seq_lens, length)
        if state is None:
            state = state_of(inputs, summary, 0, 0)
            expected_state = state_of(inputs, summary, 0, 0)
        if i == 4:
            inputs.key_cache[1, 1] += 1
        position = torch.arange(length - num_queries, length, device=inputs.query.device)
        out = step(inputs, position, state, summary=summary)
        assert torch.equal(out, two_calls(inputs, position, expected_state, summary=summary))
        assert_same_state(state, expected_state)


def test_counts_both():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(300,), max_seq_len=320))
    ops.reset_counters()
    step(inputs, torch.tensor([299]), state_of(inputs, "minmax"))
    counts = ops.counters()
    assert counts["update_calls"] == counts["sparse_calls"] == 1
    assert counts["pages_sealed"] == 18 * 2
    assert counts["sparse_rows"] == 8 and counts["max_tokens_attended"] <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"page_size": 12}, "page_size"),
        ({"cache_position": torch.tensor([320])}, "cache_position"),
        ({"cache_position": torch.tensor([1], dtype=torch.int32)}, "cache_position"),
        ({"num_sealed": torch.zeros(3, dtype=torch.int64)}, "num_sealed"),
        ({"seq_lens": torch.tensor([1, 2])}, "seq_lens"),
        ({"channel_scale": torch.ones(1, 2, 64)}, "channel_scale"),
        ({"summary": "minmax_int4"}, "summary"),
    ],
)
def test_bad_arguments_name_themselves_and_leave_the_state_alone(change, message):
    inputs = make_inputs(Case(torch.bfloat16, lengths=(300,), max_seq_len=320))
    rows, num_sealed, _ = state_of(inputs, "minmax")
    arguments = {
        "query": inputs.query,
        "key_cache": inputs.key_cache,
        "value_cache": inputs.value_cache,
        "cache_position": torch.tensor([299]),
        "page_summary": rows,
        "num_sealed": num_sealed,
        "seq_lens": inputs.seq_lens,
        "budget": 64,
    } | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.sparse_decode_step(**arguments)
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.quest.sparse_decode_step(**arguments)
    assert (num_sealed == 0).all() and (rows == 0).all()
