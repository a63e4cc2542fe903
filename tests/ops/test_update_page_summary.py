import pytest
import torch
from hostile import (
    DTYPES,
    FORMATS,
    NAN,
    every_case,
    every_dtype,
    every_format,
    fill_with_nan,
    lay_out,
    make_inputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from key_distributions import DISTRIBUTIONS, make_keys

from quest_compile import ops
from quest_compile.ops.summaries import SUMMARIES

BATCH, NUM_KV_HEADS, MAX_SEQ_LEN, HEAD_DIM = 2, 3, 203, 16
STALE_ROW, STALE_HEAD = 1, 2


def rows_of(keys, num_pages, page_size=16, **kind):
    """The first rows of a page summary: min and max by definition, sketches of the reference."""
    pages = keys[:, :, : num_pages * page_size].cpu().unflatten(2, (num_pages, page_size))
    if kind["summary"] == "minmax":
        return torch.stack([pages.amin(3), pages.amax(3)], 3) + 0.0
    page_format = ops.SummaryFormat(page_size, **kind)
    return SUMMARIES[page_format.summary].build(pages, page_format)


def assert_rows(page_summary, expected):
    num_pages = expected.shape[2]
    actual = page_summary[:, :, :num_pages].cpu().contiguous()
    assert torch.equal(actual.view(torch.uint8), expected.contiguous().view(torch.uint8))


class Cache:
    """A key cache, what is known about it, and writes as a model makes them."""

    def __init__(
        self, dtype=torch.float32, page_size=16, layout="plain", device="cpu", **page_format
    ):
        shape = (BATCH, NUM_KV_HEADS, MAX_SEQ_LEN, HEAD_DIM)
        self.keys = lay_out(torch.full(shape, NAN, dtype=dtype, device=device), layout)
        self.page_format = {"page_size": page_size, **(page_format or FORMATS[0])}
        self.summary = ops.empty_page_summary(self.keys, **self.page_format)
        for row in self.summary:
            fill_with_nan(row)
        self.unwritten = self.summary.clone()
        self.num_sealed = torch.zeros(1, dtype=torch.int64, device=device)
        self.length = 0

    def write(self, first, count, order=None):
        positions = torch.arange(first, first + count, device=self.keys.device)
        positions = positions if order is None else positions[order]
        new = torch.randn(BATCH, NUM_KV_HEADS, count, HEAD_DIM).to(self.keys)
        self.keys.index_copy_(2, positions, new)
        self.length = first + count
        self.update(positions)

    def update(self, positions):
        state = (self.summary, self.num_sealed)
        ops.update_page_summary(self.keys, positions, *state, **self.page_format)

    def assert_complete_pages(self):
        num_complete = self.length // self.page_format["page_size"]
        assert int(self.num_sealed[0]) == num_complete
        assert_rows(self.summary, rows_of(self.keys, num_complete, **self.page_format))

    def assert_up_to_date(self):
        """And nothing else was written."""
        self.assert_complete_pages()
        rest = slice(self.length // self.page_format["page_size"], None)
        after, before = (x[:, :, rest].view(torch.uint8) for x in (self.summary, self.unwritten))
        assert torch.equal(after, before)


@every_format
@every_dtype
@pytest.mark.parametrize(("head_dim", "page_size"), [(8, 8), (80, 24), (64, 16), (128, 128)])
def test_rows_have_the_bits_of_their_definition(page_format, dtype, head_dim, page_size, device):
    for name in DISTRIBUTIONS:
        keys = make_keys(name, (1, 2, 333, head_dim), dtype).to(device)
        lengths = torch.tensor([300], device=device)
        rows = ops.build_page_summary(keys, lengths, page_size=page_size, **page_format)
        assert_rows(rows, rows_of(keys, 300 // page_size, page_size, **page_format))


@every_case
def test_built_rows_are_those_of_the_complete_pages_of_each_row(case, device):
    inputs = make_inputs(case, device)
    keys = inputs.clean_keys.to(case.dtype)
    for row, length in enumerate(case.lengths):
        expected = rows_of(keys[[row]], length // case.page_size, **case.page_format())
        assert_rows(inputs.page_summary[[row]], expected)


@every_format
@pytest.mark.parametrize("page_size", [8, 16, 24])
def test_empty_page_summary_has_a_row_for_every_page(page_format, page_size):
    for max_seq_len in (1, 16, 17, 100):
        keys = torch.zeros(2, 3, max_seq_len, 8).bfloat16()
        empty = ops.empty_page_summary(keys, page_size=page_size, **page_format)
        assert empty.shape[:3] == (2, 3, -(-max_seq_len // page_size))
        if page_format["summary"] == "minmax":
            assert empty.shape[3:] == (2, 8) and empty.dtype == torch.bfloat16


@every_format
@pytest.mark.parametrize(
    ("dtype", "page_size", "layout"),
    [
        (torch.float32, 8, "plain"),
        (torch.bfloat16, 16, "tokens_first"),
        (torch.float16, 24, "gaps"),
        (torch.bfloat16, 64, "gaps"),
        (torch.float32, 128, "tokens_first"),
    ],
)
def test_prefill_and_decode(dtype, page_size, layout, page_format, device):
    cache = Cache(dtype, page_size, layout, device, **page_format)
    cache.write(0, 100)
    cache.assert_up_to_date()
    for position in range(100, MAX_SEQ_LEN):
        cache.write(position, 1)
    cache.assert_up_to_date()


@pytest.mark.parametrize("count", [1, 15, 16, 17, 63, 100, 203])
def test_prefill_of_any_length(count):
    cache = Cache()
    cache.write(0, count)
    cache.assert_up_to_date()


def test_prefill_in_pieces():
    cache = Cache()
    for first, count in ((0, 7), (7, 30), (37, 1), (38, 90), (128, 75)):
        cache.write(first, count)
        cache.assert_up_to_date()


def test_positions_in_any_order():
    cache = Cache()
    cache.write(0, 50, torch.randperm(50))
    cache.write(50, 100, torch.randperm(100))
    cache.assert_up_to_date()


def test_decoding_seals_each_page_once():
    cache = Cache()
    cache.write(0, 96)
    ops.reset_counters()
    for position in range(96, 160):
        cache.write(position, 1)
    counts = ops.counters()
    assert counts["update_calls"] == 64
    assert counts["pages_sealed"] == 4 * BATCH * NUM_KV_HEADS
    assert counts["summaries_rebuilt"] == 0


def test_rollback_costs_the_pages_written_again():
    """A few tokens are taken back and written differently, as in speculative decoding."""
    cache = Cache()
    cache.write(0, 150)
    ops.reset_counters()
    cache.write(140, 20)
    assert ops.counters()["pages_sealed"] == 2 * BATCH * NUM_KV_HEADS
    cache.write(130, 3)
    cache.write(133, 40)
    assert ops.counters()["summaries_rebuilt"] == 0
    cache.assert_complete_pages()


@every_format
def test_crop_and_continue(page_format):
    cache = Cache(**page_format)
    cache.write(0, 200)
    for length in (120, 64, 16, 15, 1):
        cache.write(length, 2)
        cache.assert_complete_pages()


def test_refill_of_the_same_length():
    cache = Cache()
    cache.write(0, 150)
    cache.write(0, 150)
    cache.assert_up_to_date()


def test_foreign_rewrite_of_the_whole_cache_is_found():
    cache = Cache()
    cache.write(0, 150)
    ops.reset_counters()
    cache.keys[:, :, :150] = torch.randn(BATCH, NUM_KV_HEADS, 150, HEAD_DIM)
    cache.write(150, 1)
    cache.assert_up_to_date()
    assert ops.counters()["summaries_rebuilt"] == BATCH * NUM_KV_HEADS


@every_format
def test_foreign_rewrite_of_one_row_and_head_rebuilds_that_one(page_format):
    cache = Cache(**page_format)
    cache.write(0, 150)
    ops.reset_counters()
    cache.keys[STALE_ROW, STALE_HEAD, :150] = torch.randn(150, HEAD_DIM)
    cache.write(150, 1)
    cache.assert_up_to_date()
    counts = ops.counters()
    assert counts["summaries_rebuilt"] == 1
    assert counts["pages_sealed"] == 9


def test_foreign_rewrite_of_the_last_sealed_page_is_found():
    cache = Cache()
    cache.write(0, 150)
    cache.keys[STALE_ROW, STALE_HEAD, 143] += 100
    cache.write(150, 1)
    cache.assert_up_to_date()


def test_foreign_rewrite_of_one_page_is_found_while_decoding_goes_on():
    cache = Cache()
    cache.write(0, 128)
    cache.keys[STALE_ROW, STALE_HEAD, 2 * 16] += 100
    for position in range(128, 176):
        cache.write(position, 1)
    cache.assert_up_to_date()


@every_format
def test_samples_are_the_pages_the_contract_names(page_format):
    """A change in one sealed page is found at once exactly if that page is sampled."""
    for length in (160, 190, 202):
        start = length // 16
        spread = (length * 2654435761) % 2**32
        sampled = {start - 1} | {(spread + j * 40503) % start for j in range(3)}
        for page in range(start):
            cache = Cache(**page_format)
            cache.write(0, length)
            cache.keys[0, 0, page * 16] += 100
            ops.reset_counters()
            cache.write(length, 1)
            assert ops.counters()["summaries_rebuilt"] == (page in sampled), (length, page)


def test_knowing_nothing_rebuilds_everything():
    cache = Cache()
    cache.write(0, 150)
    cache.keys[:, :, 16 * 3] += 100
    cache.num_sealed.zero_()
    cache.write(150, 1)
    cache.assert_up_to_date()


@pytest.mark.parametrize("first", [149, 151, 145])
def test_a_write_that_does_not_follow_rebuilds_where_the_next_position_is_known(first):
    cache = Cache()
    cache.num_sealed = torch.tensor([0, 0])
    cache.write(0, 150)
    assert cache.num_sealed.tolist() == [9, 150]
    cache.keys[:, :, 16 * 3] += 100
    cache.write(first, 2)
    cache.assert_up_to_date()
    assert int(cache.num_sealed[1]) == first + 2


def test_a_write_that_follows_or_a_next_position_of_minus_one_rebuilds_nothing():
    for next_position, first in ((0, 150), (-1, 100)):
        cache = Cache()
        cache.num_sealed = torch.tensor([0, next_position])
        cache.write(0, 150)
        ops.reset_counters()
        cache.write(first, 2)
        assert ops.counters()["pages_sealed"] <= BATCH * NUM_KV_HEADS


@every_format
def test_zeros_of_both_signs_are_no_foreign_write(page_format):
    """-0.0 equals 0.0: which of them is the minimum must not depend on how a page is reduced."""
    for dtype in DTYPES:
        cache = Cache(dtype, **page_format)
        cache.write(0, 150)
        zeros = torch.zeros(BATCH, NUM_KV_HEADS, 150, HEAD_DIM, dtype=dtype)
        cache.keys[:, :, :150] = torch.where(torch.rand_like(zeros) < 0.5, zeros, -zeros)
        cache.update(torch.arange(150))
        ops.reset_counters()
        for position in range(150, 170):
            cache.write(position, 1)
        assert ops.counters()["summaries_rebuilt"] == 0
        cache.assert_up_to_date()


_WRITES = st.lists(
    st.tuples(st.integers(0, MAX_SEQ_LEN - 1), st.sampled_from([1, 2, 16, 17, 40])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(
    writes=_WRITES,
    page_size=st.sampled_from([8, 16, 24, 64]),
    dtype=st.sampled_from(DTYPES),
    page_format=st.sampled_from(FORMATS),
)
def test_any_sequence_of_writes_equals_a_summary_from_scratch(
    writes, page_size, dtype, page_format
):
    cache = Cache(dtype, page_size, **page_format)
    for first, count in writes:
        # A cache is written behind what it holds, or anywhere inside of it, never with a gap.
        first = min(first, cache.length)
        count = min(count, MAX_SEQ_LEN - first)
        if count:
            cache.write(first, count)
        cache.assert_complete_pages()
    if cache.length >= 1:
        lengths = torch.tensor([cache.length])
        built = ops.build_page_summary(cache.keys, lengths, **cache.page_format)
        assert_rows(cache.summary, built[:, :, : cache.length // page_size])
