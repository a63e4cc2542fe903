"""Many queries at once: each attends what the mask allows up to its own position."""

import dataclasses
import random

import pytest
import torch
from hostile import DTYPES, LAYOUTS, NAN, every_dtype, lay_out
from oracle import assert_as_accurate_as
from torch.nn.functional import scaled_dot_product_attention

from quest_compile import ops

MASKS = ("none", "causal", "left_padding", "window", "holes", "per_head", "nothing", "one_row")
every_mask = pytest.mark.parametrize("mask", MASKS)


@dataclasses.dataclass(frozen=True)
class Call:
    """``start``: position of the first of ``q_len`` queries in caches of ``max_seq_len``."""

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    value_dim: int = 64
    num_kv_heads: int = 2
    group_size: int = 3
    batch: int = 2
    start: int = 70
    q_len: int = 150
    max_seq_len: int = 300
    mask: str = "none"
    layout: str = "plain"

    def __str__(self):
        return "-".join(str(x).removeprefix("torch.") for x in dataclasses.astuple(self))


CALLS = (
    Call(),
    Call(torch.bfloat16, 128, 128, 2, 4, 1, 0, 400, 512, "causal", "tokens_first"),
    Call(torch.float16, 96, 96, 1, 8, 2, 128, 128, 256, "left_padding", "gaps"),
    Call(torch.bfloat16, 256, 256, 2, 1, 1, 5, 260, 270, "holes"),
    Call(torch.float32, 8, 24, 3, 1, 2, 0, 1, 1),
    Call(torch.float32, 24, 8, 1, 7, 3, 299, 1, 300, "per_head", "gaps"),
    Call(torch.bfloat16, 80, 64, 2, 2, 2, 1000, 40, 1100, "window"),
    Call(torch.float16, 64, 72, 1, 9, 2, 0, 130, 131, "nothing", "tokens_first"),
    Call(torch.float32, 128, 64, 1, 1, 1, 0, 700, 700, "left_padding"),
    Call(torch.bfloat16, 64, 64, 3, 3, 1, 256, 257, 600, "per_head"),
)
every_call = pytest.mark.parametrize("call", CALLS, ids=str)


@dataclasses.dataclass
class Made:
    """``attended`` bool [batch, num_q_heads, q_len, max_seq_len]. What nothing attends is NaN."""

    tensors: list
    attended: torch.Tensor
    clean: tuple

    def run(self, **settings):
        return ops.dense_prefill(*self.tensors, **settings)


def make(call, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(call.dtype)

    num_q_heads = call.num_kv_heads * call.group_size
    shape = (call.batch, call.num_kv_heads, call.max_seq_len)
    query = randn(call.batch, call.q_len, num_q_heads, call.head_dim).transpose(1, 2)
    keys, values = randn(*shape, call.head_dim), randn(*shape, call.value_dim)
    own = torch.arange(call.start, call.start + call.q_len)
    mask = make_mask(call, own, generator)
    causal = torch.arange(call.max_seq_len) <= own[:, None]
    attended = causal if mask is None else causal & mask
    attended = attended.expand(call.batch, num_q_heads, -1, -1)
    dead = ~attended.any(2).unflatten(1, (call.num_kv_heads, -1)).any(2)[..., None]
    caches = [lay_out(x.masked_fill(dead, NAN), call.layout) for x in (keys, values)]
    return Made([query, *caches, own, mask], attended, (query, keys, values))


def make_mask(call, own, generator):
    position = torch.arange(call.max_seq_len)
    heads = call.num_kv_heads * call.group_size
    causal = (position <= own[:, None]).expand(call.batch, 1, -1, -1)
    if call.mask == "none":
        return None
    if call.mask == "window":
        return causal & (position > own[:, None] - 33)
    if call.mask == "left_padding":
        padding = torch.randint(0, call.start + call.q_len, (call.batch, 1, 1, 1))
        return causal & (position >= padding)
    if call.mask == "one_row":
        return (position % 5 != 3).expand(call.batch, 1, 1, -1)
    if call.mask in ("holes", "per_head"):
        num = heads if call.mask == "per_head" else 1
        shape = (call.batch, num, call.q_len, call.max_seq_len)
        return torch.rand(shape, generator=generator) < 0.7
    return causal & (position < 0) if call.mask == "nothing" else causal


def assert_attends(made, out, scale=None):
    def attention(dtype):
        query, keys, values = (x.to(dtype) for x in made.clean)
        repeats = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
        out = scaled_dot_product_attention(query, keys, values, made.attended, scale=scale)
        return out.masked_fill(~made.attended.any(-1, keepdim=True), 0)

    plain = attention(out.dtype)
    wide = attention(torch.float32).to(out.dtype)
    assert_as_accurate_as([plain, wide], out, attention(torch.float64))


@every_call
def test_is_attention_up_to_each_query(call):
    made = make(call)
    assert_attends(made, made.run())


@every_mask
@every_dtype
def test_any_mask(dtype, mask):
    made = make(Call(dtype, mask=mask))
    assert_attends(made, made.run(scale=0.3), scale=0.3)


@pytest.mark.parametrize("q_len", [1, 5, 6, 7, 127, 128, 129, 383])
def test_any_number_of_queries(q_len):
    made = make(Call(torch.bfloat16, q_len=q_len, max_seq_len=500))
    assert_attends(made, made.run())


@every_call
def test_is_dense_decode_of_each_query(call):
    """Another kernel, so as close as rounding lets it be."""
    made = make(call)
    query, keys, values, own, mask = made.tensors
    i = call.q_len // 2
    mask = None if mask is None else mask[:, :, min(i, mask.shape[2] - 1), None]
    alone = ops.dense_decode(query[:, :, i : i + 1], keys, values, own[i : i + 1] + 1, mask)
    tolerance = 8 * torch.finfo(call.dtype).eps
    torch.testing.assert_close(made.run()[:, :, i : i + 1], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [37, 128])
@pytest.mark.parametrize("mask", ["none", "left_padding", "holes"])
@every_dtype
def test_chunks_have_the_bits_of_the_whole(dtype, mask, size):
    made = make(Call(dtype, start=0, q_len=300, max_seq_len=320, mask=mask))
    query, keys, values, own, attn_mask = made.tensors
    chunks = []
    for first in range(0, 300, size):
        rows = slice(first, first + size)
        some = None if attn_mask is None else attn_mask[:, :, rows]
        # Later chunks are not written yet.
        later = torch.arange(320) > int(own[rows][-1])
        caches = (x.masked_fill(later[:, None], NAN) for x in (keys, values))
        chunks.append(ops.dense_prefill(query[:, :, rows], *caches, own[rows], some))
    assert torch.equal(torch.cat(chunks, 2), made.run())


@every_call
def test_room_behind_the_last_query_does_not_matter(call):
    made = make(call)
    query, keys, values, own, mask = made.tensors
    end = int(own[-1]) + 1
    some = None if mask is None else mask[..., :end]
    out = ops.dense_prefill(query, keys[:, :, :end], values[:, :, :end], own, some)
    assert torch.equal(out, made.run())


@every_dtype
def test_what_a_query_may_not_attend_does_not_matter(dtype):
    """Not even where the next query, of the same tile, attends a NaN."""
    made = make(Call(dtype, mask="holes"))
    expected = made.run()
    for at in (3, 100, 150):
        for cache in made.tensors[1:3]:
            cache[0, 0, at] = NAN
    spoilt = made.attended[0, :3, :, [3, 100, 150]].any(-1)
    out = made.run()
    assert out[0, :3][spoilt].isnan().all()
    assert torch.equal(out[0, :3][~spoilt], expected[0, :3][~spoilt])
    assert torch.equal(out[0, 3:], expected[0, 3:]) and torch.equal(out[1], expected[1])


def test_positions_may_stand_in_any_order():
    made = make(Call(start=0, q_len=200, max_seq_len=200))
    order = torch.randperm(200)
    query, keys, values, own, _ = made.tensors
    out = ops.dense_prefill(query[:, :, order], keys, values, own[order].int())
    assert torch.equal(out, made.run()[:, :, order])


def test_a_query_with_nothing_to_attend_gives_0():
    out = make(Call(torch.bfloat16, mask="nothing")).run()
    assert torch.equal(out, torch.zeros_like(out))


def test_equal_logits_give_the_mean_of_the_values():
    made = make(Call(start=0, q_len=300))
    query, keys, values, own, _ = made.tensors
    out = ops.dense_prefill(torch.zeros_like(query), keys, values, own)
    mean = values.double().cumsum(2) / (torch.arange(300)[:, None] + 1)
    torch.testing.assert_close(out.double(), mean.repeat_interleave(3, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_the_batch_change_a_bit(dtype):
    made = make(Call(dtype, batch=3, q_len=400, max_seq_len=500, mask="left_padding"))
    expected = made.run()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(made.run(), expected)
    query, keys, values, own, mask = made.tensors
    for row in range(3):
        tensors = (x[row : row + 1] for x in (query, keys, values))
        out = ops.dense_prefill(*tensors, own, mask[row : row + 1])
        assert torch.equal(out[0], expected[row])


def test_counts_its_calls():
    ops.reset_counters()
    make(Call()).run()
    assert ops.counters()["prefill_calls"] == 1 and ops.counters()["dense_calls"] == 0


@pytest.mark.parametrize("seeds", [range(first, first + 6) for first in range(0, 36, 6)])
def test_random_calls(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        start, q_len = rng.choice((0, 1, 64, 300)), rng.randint(1, 280)
        call = Call(
            rng.choice(DTYPES),
            8 * rng.randint(1, 32),
            8 * rng.randint(1, 32),
            rng.randint(1, 3),
            rng.choice((1, 2, 3, 5, 8)),
            rng.randint(1, 3),
            start,
            q_len,
            start + q_len + rng.choice((0, 1, 200)),
            rng.choice(MASKS),
            rng.choice(LAYOUTS),
        )
        try:
            made = make(call, seed)
            assert_attends(made, made.run())
        except Exception as error:
            raise AssertionError(f"seed {seed}: {call}: {error}") from error
