"""Page sketches: rows that every kernel makes bit by bit, scores that are those of plain torch."""

import pytest
import torch
from hostile import DTYPES, NAN
from hypothesis import given, settings
from hypothesis import strategies as st
from key_distributions import DISTRIBUTIONS, LENGTH

from quest_compile import ops
from quest_compile.ops import reference, reference_sketch

MAX_SEQ_LEN = 400
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_bits = pytest.mark.parametrize("bits", [1, 2])


def denormal(shape):
    return torch.randn(shape) * 1e-40


def huge(shape):
    return torch.randn(shape) * 3e38


def identical_in_pages(shape):
    """The keys of a page are all the same."""
    pages = torch.randn(*shape[:2], -(-shape[2] // 16), 1, shape[3])
    return pages.expand(-1, -1, -1, 16, -1).flatten(2, 3)[:, :, : shape[2]].clone()


def first_pages_differ(shape):
    keys = torch.randn(shape)
    keys[:, :, :40] = keys[:, :, :40] * 30 + 50
    return keys


def spread_channels(shape):
    return torch.randn(shape) * torch.randn(shape[-1]).exp()


SKETCHED = DISTRIBUTIONS | {
    "spread_channels": spread_channels,
    "denormal": denormal,
    "huge": huge,
    "identical_in_pages": identical_in_pages,
    "first_pages_differ": first_pages_differ,
}


def make_keys(name, dtype, head_dim=64, shape=(2, 3, MAX_SEQ_LEN)):
    torch.manual_seed(1)
    keys = SKETCHED[name]((*shape, head_dim)).to(dtype)
    return keys.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)


def build(keys, bits=1, length=LENGTH, page_size=16):
    lengths = torch.tensor([length], device=keys.device)
    return ops.build_page_summary(keys, lengths, page_size, "sketch", bits)


def build_by_reference(keys, bits=1, length=LENGTH, page_size=16):
    rows, channel_scale = ops.empty_page_summary(keys, page_size, "sketch", bits)
    num_sealed = torch.zeros(1, dtype=torch.int64)
    arguments = (keys, torch.tensor([0, length - 1]), rows, num_sealed, channel_scale)
    settings = {"page_size": page_size, "summary": "sketch", "sketch_bits": bits}
    reference.update_page_summary(*arguments, **settings)
    return rows, channel_scale


def score(query, rows, channel_scale, bits=1, lengths=(LENGTH,), by=ops.score_pages, **settings):
    settings = {"summary": "sketch", "sketch_bits": bits} | settings
    lengths = torch.tensor(lengths, device=query.device)
    return by(query, rows, lengths, channel_scale, **settings)


def assert_scores_agree(query, rows, channel_scale, bits, **settings):
    """Weights of the bits have 12 bits, those of the mean 16: a part of a product may be off by
    some units of that, of the sum of the sizes of its terms."""
    arguments = (query, rows, channel_scale, bits)
    actual = score(*arguments, **settings)
    expected = score(*arguments, **settings, by=reference.score_pages)
    assert torch.equal(actual.isinf(), expected.isinf())
    assert torch.equal(actual.isnan(), expected.isnan())
    weights = query.abs().float().unflatten(1, (rows.shape[1], -1)).squeeze(3)
    sizes = (weights @ channel_scale.abs().mT).amax(2, keepdim=True) * query.shape[-1] ** -0.5
    page_scale, unit = rows[..., -8:].contiguous().view(torch.float32).unbind(-1)
    granted = 0.004 * sizes[..., 2] * 254 * unit
    granted += 1e-4 * (sizes[..., 1] * 127 * page_scale.abs() + sizes[..., 0])
    granted = granted.repeat_interleave(actual.shape[1] // rows.shape[1], 1)
    granted += 1e-6 * expected.abs()
    is_scored = expected.isfinite()
    assert ((actual - expected).abs() <= granted)[is_scored].all()
    return actual


@dtypes
@all_bits
@pytest.mark.parametrize(("head_dim", "page_size"), [(8, 8), (80, 24), (64, 16), (128, 128)])
def test_kernels_give_the_bits_of_the_reference(dtype, bits, head_dim, page_size):
    for name in SKETCHED:
        keys = make_keys(name, dtype, head_dim, (1, 2, MAX_SEQ_LEN))
        rows, scale = build(keys, bits, page_size=page_size)
        expected_rows, expected_scale = build_by_reference(keys, bits, page_size=page_size)
        num_pages = LENGTH // page_size
        assert torch.equal(scale, expected_scale), name
        assert torch.equal(rows[:, :, :num_pages], expected_rows[:, :, :num_pages]), name


@all_bits
@pytest.mark.parametrize("group_reduce", ["sum", "max", "none"])
@pytest.mark.parametrize(
    ("head_dim", "page_size"), [(8, 8), (80, 24), (64, 16), (128, 16), (256, 64)]
)
def test_scores_agree_with_the_reference(bits, group_reduce, head_dim, page_size):
    for name in SKETCHED:
        keys = make_keys(name, torch.bfloat16, head_dim)
        rows, scale = build(keys, bits, page_size=page_size)
        query = torch.randn(2, 12, 1, head_dim).to(torch.bfloat16)
        settings = {"lengths": (LENGTH, 200), "group_reduce": group_reduce, "page_size": page_size}
        assert_scores_agree(query, rows, scale, bits, **settings)


@all_bits
@pytest.mark.parametrize("mask_heads", [1, 12])
@pytest.mark.parametrize("group_reduce", ["sum", "max", "none"])
def test_masked_tokens_do_not_count(bits, mask_heads, group_reduce):
    """Keys that nobody attends are NaN."""
    keys = make_keys("heavy_channels", torch.float32)
    mask = torch.rand(2, mask_heads, 1, MAX_SEQ_LEN) < 0.6
    mask[:, :, :, 32:48] = False
    mask[:, :, :, 64:96] = True
    attended = mask.unflatten(1, (min(mask_heads, 3), -1)).any(2)[:, :, 0]
    keys[~attended.expand(-1, 3, -1)] = NAN
    rows, scale = build(keys, bits)
    query = torch.randn(2, 12, 1, 64)
    settings = {"attn_mask": mask, "group_reduce": group_reduce, "scale": 0.1}
    actual = assert_scores_agree(query, rows, scale, bits, **settings)
    assert actual[:, :, 2].isneginf().all()
    has_token = mask.expand(-1, 12, -1, -1)[:, :, 0, : LENGTH // 16 * 16].unflatten(-1, (-1, 16))
    has_token = has_token.any(-1)
    if group_reduce != "none":
        has_token = has_token.unflatten(1, (3, 4)).any(2)
    assert torch.equal(actual[:, :, : LENGTH // 16].isfinite(), has_token)
    # A sum over fewer tokens is smaller.
    fewer = mask & (torch.rand(2, 1, 1, MAX_SEQ_LEN) < 0.7)
    smaller = score(query, rows, scale, bits, **(settings | {"attn_mask": fewer}))
    counts = actual.isfinite()
    assert (smaller <= actual + 1e-4 * actual.abs().clamp(min=1))[counts].all()
    assert smaller[~counts].isneginf().all()


@all_bits
def test_a_token_that_is_not_finite_has_the_highest_score_unless_it_is_masked(bits):
    query = torch.randn(2, 6, 1, 64)
    mask = torch.ones(1, 1, 1, MAX_SEQ_LEN, dtype=torch.bool)
    mask[..., 40] = False
    clean = make_keys("normal", torch.float32)
    for value in (NAN, torch.inf, -torch.inf):
        keys = clean.clone()
        keys[:, :, 40, 5] = value
        rows, scale = build(keys, bits)
        scores = score(query, rows, scale, bits)
        assert scores[:, :, 2].isnan().all()
        assert scores[:, :, 3:20].isfinite().all()
        pages = ops.select_pages(scores, torch.tensor([LENGTH]), page_budget=4)
        assert (pages == 2).any(-1).all()
        masked = score(query, rows, scale, bits, attn_mask=mask)
        assert masked[:, :, :20].isfinite().all()


def test_a_query_that_is_not_finite_has_scores_that_are_not_numbers():
    rows, scale = build(make_keys("normal", torch.float32))
    query = torch.randn(2, 6, 1, 64)
    query[0, 0, 0, 3], query[1, 3, 0, 5] = NAN, torch.inf
    for by in (ops.score_pages, reference.score_pages):
        scores = score(query, rows, scale, by=by, group_reduce="none")[:, :, :20]
        assert scores[0, 0].isnan().all() and scores[1, 3].isnan().all()
        assert scores[0, 1:].isfinite().all() and scores[1, :3].isfinite().all()


@all_bits
@pytest.mark.parametrize(
    "name",
    ["normal", "spread_channels", "one_heavy_channel", "one_sided", "tiny", "large",
     "first_pages_differ"],
)  # fmt: skip
def test_the_page_of_a_key_that_the_query_points_at_scores_highest(bits, name):
    """Behind the first pages, of which the scales are taken as well."""
    num_tokens, first = 1600, 96
    keys = make_keys(name, torch.float32, 128, (1, 1, num_tokens))
    rows, channel_scale = build(keys, bits, num_tokens)
    rest = keys[:, :, first:]
    centre, spread = rest.mean(2, keepdim=True), rest.std(2, keepdim=True)
    found = wanted = 0
    for token in range(first, num_tokens, 37):
        query = (keys[:, :, token : token + 1] - centre) / spread**2
        logits = (query @ rest.mT).unflatten(-1, (-1, 16)) * 128**-0.5
        best = first // 16 + logits.logsumexp(-1).argmax()
        scores = score(query, rows, channel_scale, bits, (num_tokens,))[..., first // 16 :]
        wanted += best == token // 16
        found += best == token // 16 and first // 16 + scores.argmax() == best
    assert wanted >= 38 and found >= 0.95 * wanted, (found, wanted)


def test_selection_is_that_of_float_scores():
    """Rounding the query changes less than 1 % of the selected pages."""
    same = total = 0
    for name in ("normal", "heavy_channels", "heavy_tails", "one_sided"):
        for bits in (1, 2):
            keys = make_keys(name, torch.bfloat16, 128, (1, 4, 16 * 512))
            rows, scale = build(keys, bits, 16 * 512)
            query = torch.randn(1, 16, 1, 128).to(torch.bfloat16)
            chosen = [
                score(query, rows, scale, bits, (16 * 512,), by).topk(64, -1).indices.flatten(0, 1)
                for by in (ops.score_pages, reference.score_pages)
            ]
            for ours, theirs in zip(*chosen):
                same += len(set(ours.tolist()) & set(theirs.tolist()))
                total += 64
    assert same / total >= 0.99


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, MAX_SEQ_LEN - 1), st.sampled_from([1, 2, 8, 16, 40, 200])),
        min_size=1,
        max_size=8,
    )
)
def test_any_sequence_of_writes_gives_the_bits_of_a_fresh_start(writes):
    keys = torch.zeros(1, 2, MAX_SEQ_LEN, 8)
    rows, scale = ops.empty_page_summary(keys, 8, "sketch", 2)
    num_sealed, length = torch.zeros(1, dtype=torch.int64), 0
    for first, count in writes:
        first = min(first, length)
        length = min(first + count, MAX_SEQ_LEN)
        keys[:, :, first:length] = torch.randn(1, 2, length - first, 8) * (first + 1)
        arguments = (keys, torch.arange(first, length), rows, num_sealed, scale)
        ops.update_page_summary(*arguments, page_size=8, summary="sketch", sketch_bits=2)
        fresh_rows, fresh_scale = build(keys, 2, length, page_size=8)
        num_pages = length // 8
        assert torch.equal(rows[:, :, :num_pages], fresh_rows[:, :, :num_pages])
        assert num_pages == 0 or torch.equal(scale, fresh_scale)


def test_a_foreign_write_starts_again_with_other_scales():
    keys = make_keys("normal", torch.bfloat16)
    rows, scale = build(keys)
    keys[0, 1] *= 50
    ops.reset_counters()
    arguments = (keys, torch.tensor([LENGTH]), rows, torch.tensor([20]), scale)
    ops.update_page_summary(*arguments, summary="sketch")
    assert ops.counters()["summaries_rebuilt"] == 1
    expected_rows, expected_scale = build(keys)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(rows[:, :, :20], expected_rows[:, :, :20])


def test_bits_of_tokens_are_packed_as_documented():
    bits = torch.rand(2, 24, 16) < 0.5
    plane = reference_sketch._pack(bits)
    assert plane.shape == (2, 48)
    weights = 2 ** torch.arange(8)
    # Token 3 is in the tile of 16, token 20 in that of 8.
    assert plane[0, 16 + 3] == (bits[0, 3, 8:] * weights).sum()
    assert plane[1, 32 + 4] == (bits[1, 20, :8] * weights).sum()
    assert torch.equal(reference_sketch._unpack(plane, 24).bool(), bits)
