"""Channel scales that were taken from pages of another distribution than those searched."""

import pytest
import torch

from quest_compile import ops
from quest_compile.bench.sketch_keys import synthetic_heads
from quest_compile.bench.sketch_mass import mass_by_page
from quest_compile.ops import reference_sketch

NUM_FIRST, BUDGET = 512, 16


def ten_times_as_large_and_shifted(keys, normal):
    return keys * 10 + 20 * normal


def channels_of_other_sizes(keys, normal):
    """By a factor of 1.6 up or down, as a rule."""
    return keys * (normal / 2).exp()


def mass_kept(scores, mass):
    pages = scores.topk(BUDGET, -1).indices[:, :, None].expand(-1, -1, mass.shape[2], -1)
    return mass.gather(-1, pages).sum(-1).mean().item()


def kept_with_own_and_with_found_scales(change, num_pages, bits):
    """Of the attention to the pages behind the first ones, which are changed."""
    query, keys = next(synthetic_heads("topics, heavy channels"))
    keys = keys[:, :, : num_pages * 16].clone()
    first, num_rest = NUM_FIRST * 16, num_pages - NUM_FIRST
    keys[:, :, :first] = change(keys[:, :, :first], torch.randn(1, 8, 1, 128))
    lengths, kind = torch.tensor([num_pages * 16]), {"summary": "sketch", "sketch_bits": bits}
    rows, found = ops.build_page_summary(keys, lengths, **kind)
    with_found = ops.score_pages(query, rows, lengths, found, **kind)[..., NUM_FIRST:]
    rest, rest_lengths = keys[:, :, first:], torch.tensor([num_rest * 16])
    pages = rest.unflatten(2, (num_rest, 16))
    own = reference_sketch.channel_scales(pages, torch.ones(num_rest, dtype=torch.bool))
    rows = reference_sketch.page_rows(pages, own, bits)
    with_own = ops.score_pages(query, rows, rest_lengths, own, **kind)
    mass = mass_by_page(query, rest)
    return mass_kept(with_own, mass), mass_kept(with_found, mass)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(
    ("change", "num_pages", "least"),
    [
        # The worst moment: scales of the first 512 pages alone.
        (ten_times_as_large_and_shifted, 1023, 0.8),
        (channels_of_other_sizes, 1023, 0.9),
        # Taken again from both.
        (ten_times_as_large_and_shifted, 1024, 0.98),
        (channels_of_other_sizes, 1024, 0.97),
    ],
)
def test_little_is_lost_with_scales_of_other_first_pages(change, num_pages, least, bits):
    own, found = kept_with_own_and_with_found_scales(change, num_pages, bits)
    assert least * own <= found < 1.02 * own
