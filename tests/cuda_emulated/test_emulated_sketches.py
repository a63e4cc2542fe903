"""Page sketches by the CUDA kernels in emulation: the operator tests, and what is about GPUs."""

# ruff: noqa: F401, I001 - tests run where they are imported.
import pytest
import torch
from emulated_library import configure
from test_every_op import assert_same_bits
from test_sketch import LENGTH, MAX_SEQ_LEN, all_bits, build, build_by_reference, make_keys, score
from test_sketch import (
    test_a_query_that_is_not_finite_has_scores_that_are_not_numbers,
    test_a_token_that_is_not_finite_has_the_highest_score_unless_it_is_masked,
    test_kernels_give_the_bits_of_the_reference,
    test_masked_tokens_do_not_count,
    test_scores_agree_with_the_reference,
    test_selection_is_that_of_float_scores,
    test_the_page_of_a_key_that_the_query_points_at_scores_highest,
)
from test_sketch_calls import (
    test_several_queries_select_as_if_each_came_alone,
    test_sparse_decode_is_score_select_attend,
)

from quest_compile import ops


def decode(keys, query, rows, scale, bits, page_size=16, **settings):
    lengths = torch.tensor([LENGTH, 200])
    settings |= {"summary": "sketch", "sketch_bits": bits, "page_size": page_size}
    arguments = (query, keys, keys, rows, lengths, None, scale)
    return ops.sparse_decode(*arguments, budget=4 * page_size, **settings)


# Pages of 16 and 8 tokens at a time, and too large for more than one.
shapes = pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "bits"),
    [(torch.bfloat16, 128, 16, 1), (torch.float16, 80, 24, 2), (torch.float32, 256, 64, 2)],
)


@shapes
def test_no_gpu_and_no_order_changes_a_bit(dtype, head_dim, page_size, bits):
    keys = make_keys("heavy_channels", dtype, head_dim, (2, 2, MAX_SEQ_LEN))
    query = torch.randn(2, 4, 1, head_dim).to(dtype)
    found = []
    for settings in ((4,), (132,), (1, 99 << 10), (132, 99 << 10, 1), (7, 227 << 10, 2)):
        configure(*settings)
        rows, scale = build(keys, bits, page_size=page_size)
        out = decode(keys, query, rows, scale, bits, page_size)
        found.append((rows[:, :, : LENGTH // page_size], scale, out))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@shapes
def test_rows_at_any_address_give_the_same_bits(dtype, head_dim, page_size, bits):
    keys = make_keys("normal", dtype, head_dim, (2, 2, MAX_SEQ_LEN))
    rows, scale = build(keys, bits, page_size=page_size)
    query = torch.randn(2, 4, 1, head_dim).to(dtype)
    expected = decode(keys, query, rows, scale, bits, page_size)
    for tensor in (keys, rows):
        memory = tensor.new_empty(tensor.numel() + 1)
        moved = memory[1:].view(tensor.shape).copy_(tensor)
        moved = (moved, rows) if tensor is keys else (keys, moved)
        actual = decode(moved[0], query, moved[1], scale, bits, page_size)
        assert torch.equal(actual, expected)
    memory = keys.new_empty(keys.numel() + 1)
    moved = memory[1:].view(keys.shape).copy_(keys)
    assert_same_bits(build(moved, bits, page_size=page_size), (rows, scale))


@all_bits
def test_pages_are_spread_over_the_scales_as_the_reference_says(bits):
    """More pages than scales are taken from."""
    keys = make_keys("first_pages_differ", torch.bfloat16, 8, (1, 1, 8 * 300))
    length = 8 * 270 + 3
    rows, scale = build(keys, bits, length, 8)
    expected_rows, expected_scale = build_by_reference(keys, bits, length, 8)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(rows[:, :, :270], expected_rows[:, :, :270])


def test_groups_of_many_heads():
    keys = make_keys("normal", torch.bfloat16, 64, (2, 1, MAX_SEQ_LEN))
    rows, scale = build(keys)
    query = torch.randn(2, 20, 1, 64).to(torch.bfloat16)
    for group_reduce in ("max", "none"):
        scores = score(query, rows, scale, group_reduce=group_reduce)
        every = score(query, rows, scale, group_reduce="none")
        expected = every.amax(1, keepdim=True) if group_reduce == "max" else every
        assert torch.equal(scores, expected)
