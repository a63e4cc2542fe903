"""summary="meanstd": rows that every kernel makes bit by bit, scores as plain torch has them."""

import dataclasses

import pytest
import torch
from hostile import CASES, NAN, Case, make_inputs
from oracle import assert_as_accurate_as, in_float64
from test_every_op import assert_same_bits
from test_minmax_int8 import DTYPES
from test_sketch import LENGTH, MAX_SEQ_LEN, SKETCHED, make_keys

from quest_compile import ops
from quest_compile.ops import reference, reference_means

SHAPES = ((8, 8), (80, 24), (64, 16), (128, 128))
MEANS = [dataclasses.replace(case, summary="meanstd") for case in CASES]


def build(keys, length=LENGTH, page_size=16):
    rows = ops.build_page_summary(keys, torch.tensor([length]), page_size, "meanstd")
    return rows[:, :, : length // page_size]


def pages_of(keys, length=LENGTH, page_size=16):
    """[B, K, P, T, D]"""
    num_pages = length // page_size
    return keys[:, :, : num_pages * page_size].unflatten(2, (num_pages, page_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), SHAPES)
def test_kernels_give_the_bits_of_the_reference(dtype, head_dim, page_size):
    for name in SKETCHED:
        keys = make_keys(name, dtype, head_dim, (1, 2, MAX_SEQ_LEN))
        keys[0, 0, 5, 3], keys[0, 1, 140, 7], keys[0, 1, 150, 1] = NAN, torch.inf, -torch.inf
        expected = reference_means.page_rows(pages_of(keys, page_size=page_size))
        assert_same_bits([build(keys, page_size=page_size).contiguous()], [expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_mean_and_standard_deviation(dtype):
    for name in ("normal", "heavy_channels", "one_sided", "tiny", "large"):
        keys = make_keys(name, dtype)
        pages = pages_of(keys).double()
        exact = torch.stack([pages.mean(3), pages.std(3, correction=0)], 3)
        granted = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
        granted += 16 * torch.finfo(torch.float32).eps * pages.abs().amax(3)[:, :, :, None]
        assert ((build(keys).double() - exact).abs() <= granted).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_are_all_the_same_have_no_deviation(dtype):
    for page_size in (8, 24, 40):
        keys = torch.randn(1, 2, 1, 64).mul(100).to(dtype).expand(-1, -1, 240, -1)
        mean, deviation = build(keys.contiguous(), 240, page_size).unbind(3)
        assert (deviation == 0).all() and torch.equal(mean, keys[:, :, : mean.shape[2]])


def test_the_largest_float16_does_not_overflow():
    keys = torch.full((1, 1, 32, 64), 65504.0, dtype=torch.float16)
    keys[:, :, ::2] = -65504.0
    rows = build(keys, 32)
    assert (rows[..., 0, :] == 0).all() and (rows[..., 1, :] == 65504.0).all()
    scores = ops.score_pages(keys[:, :, :1] / 65504, rows, torch.tensor([32]), summary="meanstd")
    torch.testing.assert_close(scores, torch.full((1, 1, 2), 65504.0 * 64))


@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
def test_a_page_with_a_key_that_is_not_finite_is_selected(value):
    keys = make_keys("normal", torch.bfloat16)
    keys[:, :, 40, 5] = value
    query = torch.randn(2, 6, 1, 64).to(torch.bfloat16)
    query[..., 5] = 0
    for group_reduce in ("sum", "max", "none"):
        lengths, kind = torch.tensor([LENGTH]), {"summary": "meanstd", "group_reduce": group_reduce}
        scores = ops.score_pages(query, build(keys), torch.tensor([320]), **kind)
        assert scores[:, :, 2].isnan().all() and scores[:, :, 3:20].isfinite().all()
        scores = torch.nn.functional.pad(scores, (0, 5), value=-torch.inf)
        assert (ops.select_pages(scores, lengths, page_budget=4) == 2).any(-1).all()


def score_by_sums(query, rows, seq_lens, page_size, group_reduce):
    dtype = torch.promote_types(query.dtype, torch.float32)
    mean, deviation = rows.to(dtype)[:, :, None].unbind(4)
    query = query.to(dtype).unflatten(1, (rows.shape[1], -1))
    each = (query * mean + query.abs() * deviation).sum(-1)
    reduced = {"sum": each.sum(2), "max": each.amax(2), "none": each.flatten(1, 2)}[group_reduce]
    is_complete = torch.arange(rows.shape[2]) < (seq_lens // page_size)[:, None]
    return reduced.masked_fill(~is_complete[:, None], -torch.inf)


def assert_scores(inputs, actual):
    """As accurate as plain torch; float64 scores."""
    case, arguments = inputs.case, (inputs.query, inputs.page_summary, inputs.seq_lens)
    settings = {"page_size": case.page_size, "group_reduce": case.group_reduce}
    plain = score_by_sums(*arguments, **settings)
    exact = in_float64(score_by_sums, *arguments, **settings)
    sizes = inputs.page_summary.double().abs().sum(3)[:, :, None]
    terms = (inputs.query.double().abs().unflatten(1, (case.num_kv_heads, -1)) * sizes).sum(-1)
    terms = {"sum": terms.sum(2), "max": terms.amax(2), "none": terms.flatten(1, 2)}
    assert_as_accurate_as(plain, actual, exact, 1e-5 * terms[case.group_reduce])
    return exact


@pytest.mark.parametrize("case", MEANS, ids=str)
def test_scores_are_query_times_mean_and_deviation(case):
    inputs = make_inputs(case)
    exact = assert_scores(inputs, inputs.scores())
    arguments = (inputs.query, inputs.page_summary, inputs.seq_lens)
    by_reference = in_float64(reference.score_pages, *arguments, **inputs.score_settings())
    torch.testing.assert_close(by_reference, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", MEANS[2:8], ids=str)
def test_sparse_decode_is_score_select_attend(case):
    inputs = make_inputs(case)
    out = ops.sparse_decode(*inputs.sparse(), **inputs.settings())
    pages = inputs.pages(inputs.scores())
    expected, _ = ops.attend_pages(
        *inputs.sparse()[:3], pages, inputs.seq_lens, inputs.attn_mask, page_size=case.page_size
    )
    is_sparse = inputs.seq_lens > case.budget_pages * case.page_size
    assert torch.equal(out[is_sparse], expected[is_sparse])


def test_a_foreign_write_is_found_and_a_nan_is_not_one():
    keys = make_keys("normal", torch.bfloat16)
    keys[0, 0, 16 * 19 + 3, 2] = NAN
    arguments = (keys, torch.tensor([LENGTH]), torch.zeros(2, 3, 25, 2, 64).to(torch.bfloat16))
    num_sealed = torch.zeros(1, dtype=torch.int64)
    found = []
    for _ in range(3):
        ops.reset_counters()
        ops.update_page_summary(*arguments, num_sealed, summary="meanstd")
        found.append(ops.counters()["summaries_rebuilt"])
        if len(found) == 2:
            keys[1, 2] += 1
    assert found == [0, 0, 1]
    assert_same_bits([arguments[2][:, :, :20].contiguous()], [build(keys).contiguous()])


def test_opcheck():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(300,), max_seq_len=320, summary="meanstd"))
    kind, quest = {"summary": "meanstd"}, torch.ops.quest
    query, keys, values, rows, lengths, _ = inputs.sparse()
    rows = rows.nan_to_num(0)
    torch.library.opcheck(quest.score_pages.default, (query, rows, lengths), kind)
    position, sealed = torch.tensor([299]), torch.tensor([18])
    torch.library.opcheck(
        quest.update_page_summary.default, (keys.nan_to_num(0), position, rows, sealed), kind
    )
    torch.library.opcheck(
        quest.sparse_decode.default, (query, keys, values, rows, lengths), {"budget": 64, **kind}
    )


def test_bad_arguments_name_themselves():
    inputs = make_inputs(Case(torch.bfloat16, lengths=(300,), max_seq_len=320, summary="meanstd"))
    arguments = (inputs.query, inputs.page_summary, inputs.seq_lens)
    with pytest.raises(ValueError, match="channel_scale: expected None with summary='meanstd'"):
        ops.score_pages(*arguments, torch.ones(1, 2, 64), summary="meanstd")
    with pytest.raises(RuntimeError, match="channel_scale"):
        torch.ops.quest.score_pages(*arguments, torch.ones(1, 2, 64), summary="meanstd")
    with pytest.raises(ValueError, match="page_summary: expected dtype"):
        ops.score_pages(inputs.query.float(), *arguments[1:], summary="meanstd")
    for call in (ops.score_pages, torch.ops.quest.score_pages):
        with pytest.raises((ValueError, RuntimeError), match="'meanstd'.*got 'mean'"):
            call(*arguments, summary="mean")
