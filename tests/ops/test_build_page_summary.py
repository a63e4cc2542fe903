import pytest
import torch
from hostile import CASES, lay_out

from quest_compile import ops


@pytest.mark.parametrize("case", CASES, ids=str)
def test_covers_the_complete_pages_of_each_row(case, device):
    shape = (len(case.lengths), case.num_kv_heads, case.max_seq_len, case.head_dim)
    keys = torch.randn(shape).to(device, case.dtype)
    summary = ops.build_page_summary(
        lay_out(keys, case.layout), torch.tensor(case.lengths, device=device), case.page_size
    )
    assert summary.shape == (*shape[:2], -(-case.max_seq_len // case.page_size), 2, case.head_dim)
    for row, length in enumerate(case.lengths):
        num_complete = length // case.page_size
        pages = keys[row, :, : num_complete * case.page_size]
        pages = pages.unflatten(1, (num_complete, case.page_size))
        assert torch.equal(summary[row, :, :num_complete, 0], pages.amin(2))
        assert torch.equal(summary[row, :, :num_complete, 1], pages.amax(2))


@pytest.mark.parametrize("summary", ["mean", ""])
def test_another_kind_of_summary(summary):
    with pytest.raises(ValueError, match="summary: expected one of 'minmax', 'sketch'"):
        ops.build_page_summary(torch.zeros(1, 1, 16, 8), torch.tensor([16]), summary=summary)


@pytest.mark.parametrize("page_size", [8, 16, 24])
def test_empty_page_summary_has_a_row_for_every_page(page_size):
    for max_seq_len in (1, 16, 17, 100):
        keys = torch.zeros(2, 3, max_seq_len, 8).bfloat16()
        empty, channel_scale = ops.empty_page_summary(keys, page_size)
        assert channel_scale is None
        assert empty.shape == (2, 3, -(-max_seq_len // page_size), 2, 8)
        assert empty.dtype == torch.bfloat16


def test_seq_len_beyond_the_cache():
    with pytest.raises(ValueError, match="seq_lens: expected values from 1 to 16, got 17"):
        ops.build_page_summary(torch.zeros(1, 1, 16, 8), torch.tensor([17]))
