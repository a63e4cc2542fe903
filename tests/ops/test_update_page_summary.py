import pytest
import torch
from hostile import DTYPES, NAN, lay_out
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_compile import ops

BATCH, NUM_KV_HEADS, MAX_SEQ_LEN, HEAD_DIM = 2, 3, 203, 16
STALE_ROW, STALE_HEAD = 1, 2


class Cache:
    """A key cache, what is known about it, and writes as a model makes them."""

    def __init__(self, dtype=torch.float32, page_size=16, layout="plain", device="cpu"):
        shape = (BATCH, NUM_KV_HEADS, MAX_SEQ_LEN, HEAD_DIM)
        self.keys = lay_out(torch.full(shape, NAN, dtype=dtype, device=device), layout)
        self.page_size = page_size
        self.summary, _ = ops.empty_page_summary(self.keys, page_size)
        self.summary.fill_(NAN)
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
        ops.update_page_summary(self.keys, positions, *state, page_size=self.page_size)

    def fresh(self):
        """min and max by definition, of the complete pages."""
        num_complete = self.length // self.page_size
        keys = self.keys[:, :, : num_complete * self.page_size]
        pages = keys.unflatten(2, (num_complete, self.page_size))
        return torch.stack([pages.amin(3), pages.amax(3)], 3)

    def assert_up_to_date(self):
        fresh = self.fresh()
        assert int(self.num_sealed[0]) == fresh.shape[2]
        assert torch.equal(self.summary[:, :, : fresh.shape[2]], fresh)
        assert self.summary[:, :, fresh.shape[2] :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("layout", ["plain", "tokens_first", "gaps"])
def test_prefill_and_decode(dtype, page_size, layout, device):
    cache = Cache(dtype, page_size, layout, device)
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
    torch.testing.assert_close(cache.summary[:, :, :10], cache.fresh(), rtol=0, atol=0)
    assert int(cache.num_sealed) == 10


def test_crop_and_continue():
    cache = Cache()
    cache.write(0, 200)
    for length in (120, 64, 16, 15, 1):
        cache.write(length, 2)
        fresh = cache.fresh()
        assert int(cache.num_sealed) == fresh.shape[2]
        assert torch.equal(cache.summary[:, :, : fresh.shape[2]], fresh)


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


def test_foreign_rewrite_of_one_row_and_head_rebuilds_that_one():
    cache = Cache()
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


def test_samples_are_the_pages_the_contract_names():
    """A change in one sealed page is found at once exactly if that page is sampled."""
    for length in (160, 161, 190, 202):
        start = length // 16
        spread = (length * 2654435761) % 2**32
        sampled = {start - 1} | {(spread + j * 40503) % start for j in range(3)}
        for page in range(start):
            cache = Cache()
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


def test_zeros_of_both_signs_are_no_foreign_write():
    """-0.0 equals 0.0: which of them is the minimum must not depend on how a page is reduced."""
    for dtype in DTYPES:
        cache = Cache(dtype)
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
@given(writes=_WRITES, page_size=st.sampled_from([8, 16, 24, 64]), dtype=st.sampled_from(DTYPES))
def test_any_sequence_of_writes_equals_a_summary_from_scratch(writes, page_size, dtype):
    cache = Cache(dtype, page_size)
    for first, count in writes:
        # A cache is written behind what it holds, or anywhere inside of it, never with a gap.
        first = min(first, cache.length)
        count = min(count, MAX_SEQ_LEN - first)
        if count:
            cache.write(first, count)
        fresh = cache.fresh()
        assert int(cache.num_sealed) == fresh.shape[2]
        assert torch.equal(cache.summary[:, :, : fresh.shape[2]], fresh)
    if cache.length >= 1:
        built = ops.build_page_summary(cache.keys, torch.tensor([cache.length]), page_size)
        num_complete = cache.length // page_size
        scratch, kept = built[:, :, :num_complete], cache.summary[:, :, :num_complete]
        assert torch.equal(scratch.view(torch.uint8), kept.contiguous().view(torch.uint8))
