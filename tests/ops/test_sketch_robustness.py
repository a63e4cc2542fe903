"""Sketches of unpleasant keys: scores that are numbers, and no page lost that should be found."""

import pytest
import torch
from test_sketch import (
    LENGTH,
    SKETCHED,
    all_bits,
    assert_scores_agree,
    build,
    dtypes,
    make_keys,
    score,
)

from quest_compile import ops

NUM_PAGES = LENGTH // 16


def near_fp16_max(shape):
    """The sum of two keys overflows float16."""
    return torch.randn(shape).sign() * 6e4 + torch.randn(shape) * 1e3


@all_bits
@dtypes
@pytest.mark.parametrize("name", [*SKETCHED])
def test_finite_keys_have_finite_scores_near_those_of_the_reference(name, dtype, bits):
    keys = make_keys(name, dtype)
    rows, scale = build(keys, bits)
    for size in (1.0, 1e-3):
        query = (torch.randn(2, 6, 1, 64) * size).to(dtype)
        actual = assert_scores_agree(query, rows, scale, bits)
        assert actual[:, :, :NUM_PAGES].isfinite().all()


@all_bits
@pytest.mark.parametrize("name", ["constant", "zero"])
def test_pages_that_are_alike_score_alike_and_the_first_are_chosen(bits, name):
    keys = make_keys(name, torch.bfloat16)
    rows, scale = build(keys, bits)
    scores = score(torch.randn(2, 6, 1, 64).to(torch.bfloat16), rows, scale, bits)
    assert torch.equal(scores[:, :, :NUM_PAGES], scores[:, :, :1].expand(-1, -1, NUM_PAGES))
    pages = ops.select_pages(scores, torch.tensor([LENGTH]), page_budget=5)
    assert torch.equal(pages, torch.tensor([0, 1, 2, 19, 20]).int().expand(2, 3, 5))


@all_bits
@dtypes
def test_denormal_keys_score_as_zeros_do(dtype, bits):
    query = torch.randn(2, 6, 1, 64)
    denormal, zero = (make_keys(name, dtype) for name in ("denormal", "zero"))
    assert dtype == torch.float16 or denormal.abs().amax() > 0
    found, expected = (score(query, *build(keys, bits), bits) for keys in (denormal, zero))
    assert torch.allclose(found[:, :, :NUM_PAGES], expected[:, :, :NUM_PAGES], atol=1e-6)


@all_bits
@dtypes
def test_pages_of_one_key_are_ranked_by_it(dtype, bits):
    """Nothing is left of the keys: a score is off by what the mean's last bit may change."""
    keys = make_keys("identical_in_pages", dtype)
    query = torch.randn(2, 3, 1, 64)
    rows, scale = build(keys, bits)
    scores = score(query, rows, scale, bits)[:, :, :NUM_PAGES]
    pages = keys.float()[:, :, : NUM_PAGES * 16 : 16]
    exact = (query @ pages.mT).squeeze(2) / 8 + torch.tensor(16.0).log()
    unit = rows[:, :, :NUM_PAGES, -8:-4].contiguous().view(torch.float32).squeeze(-1)
    half_a_unit = unit / 2 * (query.squeeze(2).abs() * scale[:, :, 1]).sum(-1, keepdim=True) / 8
    assert ((scores - exact).abs() <= 1.05 * half_a_unit + 1e-4).all()
    assert ((scores - exact).abs() > 0.01 * half_a_unit).any()


@all_bits
def test_a_sum_beyond_float16_hides_no_page(bits):
    num_tokens = 1600
    torch.manual_seed(1)
    keys = near_fp16_max((1, 1, num_tokens, 128)).half()
    assert keys.isfinite().all() and (keys[:, :, 1::2] + keys[:, :, ::2]).isinf().any()
    rows, scale = build(keys, bits, num_tokens)
    for token in range(0, num_tokens, 37):
        query = keys[:, :, token : token + 1].float() / 6e4**2
        scores = score(query, rows, scale, bits, (num_tokens,))
        assert scores[..., : num_tokens // 16].argmax() == token // 16


@all_bits
def test_a_key_that_overflowed_float16_is_attended(bits):
    keys = make_keys("normal", torch.float32)
    keys[:, :, 40, 5] = 7e4
    rows, scale = build(keys.half(), bits)
    scores = score(torch.randn(2, 6, 1, 64).half(), rows, scale, bits)
    assert scores[:, :, 2].isnan().all() and scores[:, :, 3:NUM_PAGES].isfinite().all()
    pages = ops.select_pages(scores, torch.tensor([LENGTH]), page_budget=4)
    assert (pages == 2).any(-1).all()
