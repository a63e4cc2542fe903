"""Page bounds as int8: half the bytes, never below a key of the page, the same on every kernel."""

import pytest
import torch
from hostile import NAN
from hypothesis import given, settings
from hypothesis import strategies as st
from test_every_op import assert_same_bits

from quest_compile import ops
from quest_compile.ops import reference

INT8 = "minmax_int8"
LENGTH, MAX_SEQ_LEN = 333, 400
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def heavy_channels(shape):
    return torch.randn(shape) * (3 * torch.randn(shape[-1])).exp()


def one_heavy_channel(shape):
    keys = torch.randn(shape)
    keys[..., 3] = 1000 + keys[..., 3]
    return keys


def changing(shape):
    """Other channels are large in the second half."""
    keys = torch.randn(shape)
    keys[:, :, LENGTH // 2 :, : shape[-1] // 2] *= 100
    keys[:, :, : LENGTH // 2, shape[-1] // 2 :] *= 100
    return keys


DISTRIBUTIONS = {
    "normal": torch.randn,
    "heavy_channels": heavy_channels,
    "one_heavy_channel": one_heavy_channel,
    "heavy_tails": lambda shape: torch.distributions.StudentT(1.0).sample(shape),
    "changing": changing,
    "constant": lambda shape: torch.full(shape, 0.7),
    "zero": torch.zeros,
    "one_sided": lambda shape: torch.rand(shape) + 5,
    "tiny": lambda shape: torch.randn(shape) * 1e-6,
    "large": lambda shape: torch.randn(shape) * 1e3,
}
distributions = pytest.mark.parametrize("name", DISTRIBUTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_keys(name, dtype, head_dim=64):
    torch.manual_seed(1)
    keys = DISTRIBUTIONS[name]((2, 3, MAX_SEQ_LEN, head_dim)).to(dtype)
    return keys.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)


def build(keys, length=LENGTH, page_size=16):
    return ops.build_page_summary(keys, torch.tensor([length]), page_size, INT8)


def build_by_reference(keys, length=LENGTH, page_size=16):
    rows, channel_scale = ops.empty_page_summary(keys, page_size, INT8)
    num_sealed = torch.zeros(1, dtype=torch.int64)
    arguments = (keys, torch.tensor([0, length - 1]), rows, num_sealed, channel_scale)
    reference.update_page_summary(*arguments, page_size=page_size, summary=INT8)
    return rows, channel_scale


@dtypes
@distributions
@pytest.mark.parametrize("head_dim", [8, 80, 256])
def test_kernels_give_the_bits_of_the_reference(name, dtype, head_dim):
    keys = make_keys(name, dtype, head_dim)
    (rows, scale), (expected_rows, expected_scale) = build(keys), build_by_reference(keys)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(rows[:, :, : LENGTH // 16], expected_rows[:, :, : LENGTH // 16])


@dtypes
@distributions
@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_no_key_exceeds_the_score_of_its_page(name, dtype, page_size):
    keys = make_keys(name, dtype)
    rows, scale = build(keys, page_size=page_size)
    query = torch.randn(2, 6, 1, 64).to(dtype)
    settings = {"page_size": page_size, "group_reduce": "none", "summary": INT8}
    scores = ops.score_pages(query, rows, torch.tensor([LENGTH]), scale, **settings)
    num_pages = LENGTH // page_size
    keys_of_heads = keys.double().repeat_interleave(2, 1)[:, :, : num_pages * page_size]
    products = query.double() @ keys_of_heads.mT
    highest = products[:, :, 0].unflatten(-1, (num_pages, page_size)).amax(-1)
    # What float32 may lose in a sum of 128 products.
    terms = (query.double().abs() @ keys_of_heads.abs().mT)[:, :, 0]
    rounding = terms.unflatten(-1, (num_pages, page_size)).amax(-1) * 128 * 2**-24
    assert (scores[:, :, :num_pages].double() >= highest - rounding).all()


@dtypes
@distributions
def test_bounds_hold_for_every_channel(name, dtype):
    """Exact: int8 * page scale * channel scale in float64 contains every key."""
    keys = make_keys(name, dtype)
    rows, channel_scale = build(keys)
    rows = rows[:, :, : LENGTH // 16]
    page_scale = rows[..., 128:132].contiguous().view(torch.float32).double()
    bounds = rows[..., :128].view(torch.int8).double() * page_scale
    bounds = bounds.unflatten(-1, (2, 64)) * channel_scale[:, :, None, None].double()
    pages = keys[:, :, : LENGTH // 16 * 16].double().unflatten(2, (-1, 16))
    # The product of the two scales is rounded once.
    low, high = bounds.unbind(3)
    assert (low - low.abs() * 2**-23 <= pages.amin(3)).all()
    assert (high + high.abs() * 2**-23 >= pages.amax(3)).all()


@pytest.mark.parametrize("name", ["normal", "heavy_channels", "one_sided"])
def test_scores_are_close_to_those_of_exact_bounds(name):
    keys = make_keys(name, torch.bfloat16)
    rows, scale = build(keys)
    query = torch.randn(2, 6, 1, 64).to(torch.bfloat16)
    lengths = torch.tensor([LENGTH])
    loose = ops.score_pages(query, rows, lengths, scale, summary=INT8)[:, :, : LENGTH // 16]
    exact = ops.score_pages(query, ops.build_page_summary(keys, lengths), lengths)
    exact = exact[:, :, : LENGTH // 16]
    assert ((loose - exact) / exact.abs().amax()).abs().max() < 0.03


@pytest.mark.parametrize("group_reduce", ["sum", "max", "none"])
@dtypes
def test_scores_agree_with_the_reference(group_reduce, dtype):
    keys = make_keys("heavy_channels", dtype)
    rows, scale = build(keys)
    query = torch.randn(2, 12, 1, 64).to(dtype)
    settings = {"group_reduce": group_reduce, "summary": INT8}
    arguments = (query, rows, torch.tensor([LENGTH, 100]), scale)
    actual = ops.score_pages(*arguments, **settings)
    expected = reference.score_pages(*arguments, **settings)
    assert torch.equal(actual.isinf(), expected.isinf())
    is_scored = expected.isfinite()
    torch.testing.assert_close(actual[is_scored], expected[is_scored], rtol=1e-4, atol=1e-2)


def test_a_page_with_a_nan_or_infinity_has_the_highest_score():
    for value in (NAN, torch.inf, -torch.inf):
        keys = make_keys("normal", torch.float32)
        keys[:, :, 40, 5] = value
        rows, scale = build(keys)
        query = torch.randn(2, 6, 1, 64)
        scores = ops.score_pages(query, rows, torch.tensor([LENGTH]), scale, summary=INT8)
        assert scores[:, :, 2].isnan().all()
        assert scores[:, :, 3:20].isfinite().all()
        pages = ops.select_pages(scores, torch.tensor([LENGTH]), page_budget=4)
        assert (pages == 2).any(-1).all()


def test_sparse_decode_is_score_select_attend():
    keys, values = make_keys("heavy_channels", torch.bfloat16), torch.randn(2, 3, MAX_SEQ_LEN, 64)
    caches, lengths = (keys, values.to(torch.bfloat16)), torch.tensor([LENGTH, 200])
    rows, scale = build(keys)
    query = torch.randn(2, 12, 1, 64).to(torch.bfloat16)
    out = ops.sparse_decode(query, *caches, rows, lengths, None, scale, budget=64, summary=INT8)
    scores = ops.score_pages(query, rows, lengths, scale, summary=INT8)
    pages = ops.select_pages(scores, lengths, page_budget=4)
    expected, _ = ops.attend_pages(query, *caches, pages, lengths)
    assert torch.equal(out, expected)


def test_bytes_read_are_about_half():
    keys = make_keys("normal", torch.bfloat16, head_dim=128)
    query, lengths = torch.randn(2, 6, 1, 128).to(torch.bfloat16), torch.tensor([LENGTH])
    read = []
    for summary in ("minmax", INT8):
        built = ops.build_page_summary(keys, lengths, 16, summary)
        rows, scale = (built, None) if summary == "minmax" else built
        ops.reset_counters()
        ops.sparse_decode(query, keys, keys, rows, lengths, None, scale, budget=64, summary=summary)
        read.append(ops.counters()["bytes_read"])
    # 20 complete pages of 3 KV heads of 2 rows, 512 bytes each or 264.
    assert read[0] - read[1] == 20 * 6 * (512 - 264)


@dtypes
@pytest.mark.parametrize("name", ["changing", "heavy_tails"])
def test_pages_sealed_one_by_one_are_those_of_a_fresh_start(name, dtype):
    """Also after steps back, over a doubling of the number of pages too."""
    keys = make_keys(name, dtype)
    rows, scale = build(keys, 40)
    num_sealed = torch.tensor([2])
    positions = [*range(40, 270), *range(250, 290), 40, *range(41, 70), *range(70, LENGTH)]
    for position in positions:
        arguments = (keys, torch.tensor([position]), rows, num_sealed, scale)
        ops.update_page_summary(*arguments, summary=INT8)
        num_pages = (position + 1) // 16
        if position % 7 == 0:
            fresh_rows, fresh_scale = build(keys, position + 1)
            assert torch.equal(scale, fresh_scale)
            assert torch.equal(rows[:, :, :num_pages], fresh_rows[:, :, :num_pages])
    assert int(num_sealed) == LENGTH // 16


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, MAX_SEQ_LEN - 1), st.sampled_from([1, 2, 8, 16, 40, 200])),
        min_size=1,
        max_size=8,
    )
)
def test_any_sequence_of_writes_gives_the_bits_of_a_fresh_start(writes):
    keys = torch.zeros(1, 2, MAX_SEQ_LEN, 8)
    rows, scale = ops.empty_page_summary(keys, 8, INT8)
    num_sealed, length = torch.zeros(1, dtype=torch.int64), 0
    for first, count in writes:
        first = min(first, length)
        length = min(first + count, MAX_SEQ_LEN)
        keys[:, :, first:length] = torch.randn(1, 2, length - first, 8) * (first + 1)
        arguments = (keys, torch.arange(first, length), rows, num_sealed, scale)
        ops.update_page_summary(*arguments, page_size=8, summary=INT8)
        fresh_rows, fresh_scale = build(keys, length, page_size=8)
        num_pages = length // 8
        assert torch.equal(rows[:, :, :num_pages], fresh_rows[:, :, :num_pages])
        assert num_pages == 0 or torch.equal(scale, fresh_scale)


def test_a_foreign_write_starts_again_with_other_scales():
    keys = make_keys("normal", torch.bfloat16)
    rows, scale = build(keys)
    keys[0, 1] *= 50
    ops.reset_counters()
    arguments = (keys, torch.tensor([LENGTH]), rows, torch.tensor([20]), scale)
    ops.update_page_summary(*arguments, summary=INT8)
    assert ops.counters()["summaries_rebuilt"] == 1
    expected_rows, expected_scale = build(keys)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(rows[:, :, :20], expected_rows[:, :, :20])


def test_number_of_threads_changes_no_bit():
    keys = make_keys("heavy_tails", torch.bfloat16)
    query = torch.randn(2, 12, 1, 64).to(torch.bfloat16)
    num_threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            rows, scale = build(keys)
            lengths = torch.tensor([LENGTH])
            out = ops.sparse_decode(
                query, keys, keys, rows, lengths, None, scale, budget=64, summary=INT8
            )
            found.append((rows[:, :, :20], scale, out))
    finally:
        torch.set_num_threads(num_threads)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_opcheck():
    keys = make_keys("normal", torch.bfloat16)
    rows, scale = build(keys)
    query, lengths = torch.randn(2, 6, 1, 64).to(torch.bfloat16), torch.tensor([LENGTH])
    quest = torch.ops.quest
    rows[:, :, 20:] = 0
    torch.library.opcheck(
        quest.score_pages.default, (query, rows, lengths, scale), {"summary": INT8}
    )
    torch.library.opcheck(
        quest.sparse_decode.default,
        (query, keys, keys, rows, lengths, None, scale),
        {"budget": 64, "summary": INT8},
    )
    torch.library.opcheck(
        quest.update_page_summary.default,
        (keys, torch.tensor([LENGTH]), rows, torch.tensor([20]), scale),
        {"summary": INT8},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summary": "minmax"}, "page_summary"),
        ({"summary": "int4"}, "summary: expected one of 'minmax', 'minmax_int8'"),
        ({"channel_scale": None}, "channel_scale"),
        ({"channel_scale": torch.ones(2, 3, 63)}, "channel_scale"),
        ({"channel_scale": torch.ones(2, 3, 64).double()}, "channel_scale"),
        ({"channel_scale": torch.ones(3, 2, 64).transpose(0, 1)}, "channel_scale"),
        ({"channel_scale": 1.0}, "channel_scale"),
    ],
)
def test_bad_arguments_name_themselves(change, message):
    keys = make_keys("normal", torch.bfloat16)
    rows, scale = build(keys)
    arguments = {
        "query": torch.randn(2, 6, 1, 64).to(torch.bfloat16),
        "key_cache": keys,
        "value_cache": keys,
        "page_summary": rows,
        "seq_lens": torch.tensor([LENGTH]),
        "channel_scale": scale,
        "budget": 64,
        "summary": INT8,
    } | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.sparse_decode(**arguments)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.quest.sparse_decode(**arguments)


def test_what_is_forgotten_is_named():
    keys = make_keys("normal", torch.bfloat16)
    query, lengths = keys[:, :, :1], torch.tensor([LENGTH])
    with pytest.raises(TypeError, match="got a tuple.*channel_scale"):
        ops.sparse_decode(query, keys, keys, build(keys), lengths, budget=64)
    with pytest.raises(ValueError, match="need summary='minmax_int8'"):
        ops.sparse_decode(query, keys, keys, build(keys)[0], lengths, budget=64)


def test_rows_of_another_size_are_an_error():
    keys = make_keys("normal", torch.bfloat16)
    rows, scale = build(keys)
    with pytest.raises(ValueError, match="page_summary: expected .*bytes_per_page"):
        ops.score_pages(keys[:, :, :1], rows[..., :132], torch.tensor([5]), scale, summary=INT8)
