import pytest
import torch
from hostile import NAN, every_dtype
from oracle import assert_as_accurate_as
from torch.nn.functional import linear

from quest_compile import ops


def make(dtype, num_rows=1, in_features=1032, out_features=37, seed=0):
    """x, weight, bias; the weight is a part of a larger one, with NaN around it."""
    torch.manual_seed(seed)
    whole = torch.full((out_features + 2, in_features + 23), NAN)
    whole[1:-1, 7:-16].normal_()
    x, bias = torch.randn(num_rows, in_features), torch.randn(out_features)
    return x.to(dtype), whole.to(dtype)[1:-1, 7:-16], bias.to(dtype)


def assert_is_linear(out, x, weight, bias):
    orders = [slice(None), torch.arange(x.shape[-1]).flip(0), torch.randperm(x.shape[-1])]
    plain = [linear(x[..., order], weight[:, order], bias) for order in orders]
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_as_accurate_as(plain, out, exact)


@every_dtype
@pytest.mark.parametrize("num_rows", range(1, 9))
def test_is_a_linear_layer(dtype, num_rows):
    x, weight, bias = make(dtype, num_rows)
    assert_is_linear(ops.linear_decode(x, weight, bias), x, weight, bias)
    assert_is_linear(ops.linear_decode(x, weight), x, weight, None)


@every_dtype
@pytest.mark.parametrize("in_features", [8, 16, 24, 56, 1016, 1024, 3080, 8192])
def test_any_multiple_of_8(dtype, in_features):
    x, weight, bias = make(dtype, 3, in_features)
    assert_is_linear(ops.linear_decode(x, weight, bias), x, weight, bias)


@every_dtype
@pytest.mark.parametrize("out_features", [1, 2, 3, 4, 5, 7, 8, 1000])
def test_any_number_of_outputs(dtype, out_features):
    x, weight, bias = make(dtype, 5, 520, out_features)
    assert_is_linear(ops.linear_decode(x, weight, bias), x, weight, bias)


@every_dtype
def test_each_row_has_the_bits_it_has_alone(dtype):
    x, weight, bias = make(dtype, 8, 2072, 300)
    alone = torch.cat([ops.linear_decode(row[None], weight, bias) for row in x])
    for num_rows in range(1, 9):
        assert torch.equal(ops.linear_decode(x[:num_rows], weight, bias), alone[:num_rows])


@every_dtype
def test_threads_and_layout_change_no_bit(dtype):
    x, weight, bias = make(dtype, 3, 2072, 1001)
    torch.set_num_threads(1)
    expected = ops.linear_decode(x, weight, bias)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(ops.linear_decode(x, weight.contiguous(), bias), expected)
        assert torch.equal(ops.linear_decode(x, weight, bias.repeat_interleave(2)[::2]), expected)
        assert torch.equal(ops.linear_decode(x.mT.contiguous().mT, weight, bias), expected)
        assert torch.equal(ops.linear_decode(x[:, None], weight, bias), expected[:, None])
        assert torch.equal(ops.linear_decode(x[None, 0], weight, bias), expected[:1])
        assert torch.equal(ops.linear_decode(x[0], weight, bias), expected[0])


@every_dtype
def test_nan_stays_where_it_is(dtype):
    x, weight, bias = make(dtype, 6, 520, 50)
    expected = ops.linear_decode(x, weight, bias)
    weight[7, 100] = NAN
    x[2, 3] = NAN
    out = ops.linear_decode(x, weight, bias)
    is_spoilt = torch.zeros_like(out, dtype=torch.bool)
    is_spoilt[:, 7] = is_spoilt[2] = True
    assert torch.equal(out.isnan(), is_spoilt)
    assert torch.equal(out[~is_spoilt], expected[~is_spoilt])


def test_calls_and_bytes_are_counted():
    x, weight, _ = make(torch.bfloat16, 2, 64, 10)
    ops.reset_counters()
    ops.linear_decode(x, weight)
    ops.linear_decode(x, weight)
    counted = ops.counters()
    assert (counted["linear_calls"], counted["weight_bytes_read"]) == (2, 2 * 64 * 10 * 2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x, weight, bias: (x.double(), weight, bias)),
        ("x", lambda x, weight, bias: (x[:, :-8], weight, bias)),
        ("x", lambda x, weight, bias: (x[:0], weight, bias)),
        ("x", lambda x, weight, bias: (x.repeat(3, 1), weight, bias)),
        ("x", lambda x, weight, bias: (x[0, 0], weight, bias)),
        ("weight", lambda x, weight, bias: (x, weight.half(), bias)),
        ("weight", lambda x, weight, bias: (x, weight[0], bias)),
        ("weight", lambda x, weight, bias: (x, weight.mT.contiguous().mT, bias)),
        ("weight", lambda x, weight, bias: (x[:, :-4], weight[:, :-4], bias)),
        ("weight", lambda x, weight, bias: (x, weight.to("meta"), bias)),
        ("bias", lambda x, weight, bias: (x, weight, bias[:-1])),
        ("bias", lambda x, weight, bias: (x, weight, bias[None])),
        ("bias", lambda x, weight, bias: (x, weight, bias.half())),
        ("bias", lambda x, weight, bias: (x, weight, bias.to("meta"))),
    ],
)
def test_a_bad_argument_is_named(name, change):
    arguments = change(*make(torch.float32, 3, 64, 10))
    for function in (ops.linear_decode, torch.ops.quest.linear_decode):
        with pytest.raises((ValueError, RuntimeError), match=f"{name}: expected"):
            function(*arguments)


def test_what_is_no_tensor_is_named():
    x, weight, _ = make(torch.float32)
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        ops.linear_decode(x, weight.tolist())
