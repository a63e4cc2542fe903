import pytest
import torch

from quest_compile import ops


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(2, 1, 1, 100) < 0.5,
        torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(3, 4, 1, 50),
        (torch.rand(50, 4, 1, 3) < 0.5).transpose(0, 3),
        torch.rand(7) < 0.5,
    ],
    ids=["contiguous", "expanded", "transposed", "one_dimension"],
)
def test_is_a_contiguous_copy(mask):
    shared = ops.share_mask(mask)
    assert torch.equal(shared, mask) and shared.is_contiguous()
    assert shared.data_ptr() != mask.data_ptr()


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 1, 8), torch.ones(8, dtype=torch.uint8)])
def test_takes_bool_only(mask):
    with pytest.raises(ValueError, match="attn_mask: expected dtype bool"):
        ops.share_mask(mask)
    with pytest.raises((RuntimeError, ValueError), match="attn_mask"):
        torch.ops.quest.share_mask(mask)
