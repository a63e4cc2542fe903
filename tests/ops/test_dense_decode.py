import pytest
import torch
from hostile import NAN, Case, every_case, every_dtype, make_inputs
from test_attend_pages import assert_attends

from quest_compile import ops


@every_case
def test_is_attention_over_all_live_positions(case, device):
    inputs = make_inputs(case, device)
    out = ops.dense_decode(*inputs.dense())
    assert_attends(inputs, inputs.live[:, :, None], out)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1023, 1024, 1025, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_length(dtype, length):
    inputs = make_inputs(Case(dtype, lengths=(length,), max_seq_len=5001, mask="row"))
    out = ops.dense_decode(*inputs.dense(), scale=0.1)
    assert_attends(inputs, inputs.live[:, :, None], out, scale=0.1)


@pytest.mark.parametrize("length", [1, 100, 1024, 1500])
def test_room_behind_the_last_token_does_not_matter(length):
    inputs = make_inputs(Case(torch.bfloat16, lengths=(length,), max_seq_len=3000))
    expected = ops.dense_decode(*inputs.dense())
    caches = (cache[:, :, :length] for cache in (inputs.key_cache, inputs.value_cache))
    assert torch.equal(ops.dense_decode(inputs.query, *caches, inputs.seq_lens), expected)


@every_dtype
def test_masked_tokens_are_never_attended(dtype):
    """Not even by the other heads of the group when one of them attends a NaN."""
    inputs = make_inputs(Case(dtype, num_kv_heads=1, mask="per_head"))
    expected = ops.dense_decode(*inputs.dense())
    position = int((inputs.live[0, 0] & ~inputs.live[0, 1]).nonzero()[0])
    spoilt = inputs.live[0, :, position]
    for cache in (inputs.key_cache, inputs.value_cache):
        cache[0, 0, position] = NAN
    out = ops.dense_decode(*inputs.dense())
    assert out[0, spoilt].isnan().all()
    assert torch.equal(out[0, ~spoilt], expected[0, ~spoilt])


def test_one_token_is_its_value():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(1, 1), max_seq_len=40))
    expected = inputs.value_cache[:, :, :1].repeat_interleave(4, 1)
    assert torch.equal(ops.dense_decode(*inputs.dense()), expected)


def test_query_may_have_any_strides():
    inputs = make_inputs(Case())
    expected = ops.dense_decode(*inputs.dense())
    query, *others = inputs.dense()
    for strided in (query.transpose(1, 2).contiguous().transpose(1, 2), query.mT.contiguous().mT):
        assert torch.equal(ops.dense_decode(strided, *others), expected)
    spread = torch.stack([query, query], -1)[..., 0]
    assert torch.equal(ops.dense_decode(spread, *others), expected)
