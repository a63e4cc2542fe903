import pytest
import torch
from hostile import NAN, Case, every_case, every_dtype, make_inputs, wild_slots
from oracle import assert_as_accurate_as, exact_attention, plain_attention


def listed_positions(inputs, pages):
    """bool [batch, num_q_heads, 1, max_seq_len]: what each query head attends."""
    positions = torch.arange(inputs.case.max_seq_len, device=pages.device) // inputs.case.page_size
    is_listed = (pages[..., None, :] == positions[:, None]).any(-1)
    is_listed = is_listed.repeat_interleave(inputs.live.shape[1] // pages.shape[1], 1)
    return (inputs.live & is_listed)[:, :, None]


def assert_attends(inputs, is_attended, out, lse=None, scale=None):
    """out and lse are those of attention over these positions."""
    tensors = (*inputs.clean(), is_attended)
    exact, exact_lse = exact_attention(*tensors, scale=scale)
    outs, _ = plain_attention(*tensors, inputs.case.dtype, scale)
    assert_as_accurate_as(outs, out, exact)
    if lse is not None:
        _, lses = plain_attention(*tensors, torch.float32, scale)
        assert_as_accurate_as(lses, lse, exact_lse)


@every_case
def test_is_attention_over_the_listed_pages(case, device):
    inputs = make_inputs(case, device)
    pages = inputs.pages(inputs.scores())
    out, lse = inputs.attend(wild_slots(pages))
    assert_attends(inputs, listed_positions(inputs, pages), out, lse)


@pytest.mark.parametrize("scale", [0.02, 1.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_multiplies_the_logits(scale, dtype):
    inputs = make_inputs(Case(dtype))
    pages = inputs.pages(inputs.scores())
    out, lse = inputs.attend(pages, scale=scale)
    assert_attends(inputs, listed_positions(inputs, pages), out, lse, scale)


def test_skips_slots_that_are_no_page_in_use():
    inputs = make_inputs(Case(lengths=(50,)))
    full = torch.arange(4, dtype=torch.int32).expand(1, 2, 4)
    out, lse = inputs.attend(full)
    wild = torch.tensor([-5, 0, 4, 1, -1, 2, 7, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    wild_out, wild_lse = inputs.attend(wild.expand(1, 2, -1))
    torch.testing.assert_close(wild_out, out)
    torch.testing.assert_close(wild_lse, lse)


@every_dtype
def test_nothing_attended_is_zero_and_minus_infinity(dtype):
    inputs = make_inputs(Case(dtype, lengths=(50, 20)))
    pages = torch.full((2, 2, 4), -1, dtype=torch.int32)
    pages[1, 0, 0] = 1
    out, lse = inputs.attend(pages)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert (out[1, 4:] == 0).all() and (lse[1, 4:] == -torch.inf).all()
    assert lse[1, :4].isfinite().all()


def test_no_other_page_is_read(device):
    inputs = make_inputs(Case(torch.bfloat16, lengths=(500,), max_seq_len=512), device)
    pages = inputs.pages(inputs.scores())
    expected = inputs.attend(pages)
    for head in range(2):
        is_chosen = torch.isin(torch.arange(32), pages[0, head].cpu()).repeat_interleave(16)
        for cache in (inputs.key_cache, inputs.value_cache):
            cache[0, head, ~is_chosen] = NAN
    actual = inputs.attend(pages)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_dtype
@pytest.mark.parametrize("per_query_head", [False, True])
def test_masked_tokens_are_never_attended(dtype, per_query_head):
    """Not even by the other heads of the group when one of them attends a NaN."""
    inputs = make_inputs(Case(dtype, num_kv_heads=1, mask="per_head"))
    pages = inputs.pages(torch.zeros(1, 4 if per_query_head else 1, 8))
    expected, expected_lse = inputs.attend(pages)
    position = int((inputs.live[0, 0] & ~inputs.live[0, 1]).nonzero()[0])
    spoilt = inputs.live[0, :, position] & (pages == position // 16).any(-1)[0]
    for cache in (inputs.key_cache, inputs.value_cache):
        cache[0, 0, position] = NAN
    out, lse = inputs.attend(pages)
    assert out[0, spoilt].isnan().all()
    assert torch.equal(out[0, ~spoilt], expected[0, ~spoilt])
    assert torch.equal(lse[0, ~spoilt], expected_lse[0, ~spoilt])


def test_large_logits_do_not_overflow():
    inputs = make_inputs(Case(lengths=(100,)))
    inputs.query.mul_(1000)
    pages = inputs.pages(inputs.scores())
    out, lse = inputs.attend(pages)
    assert_attends(inputs, listed_positions(inputs, pages), out, lse)
