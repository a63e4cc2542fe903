"""Page sketches on a GPU: rows have the bits of the reference, scores are those of plain torch."""

import pytest
import torch
from test_sketch import (
    LENGTH,
    SKETCHED,
    all_bits,
    assert_scores_agree,
    build,
    build_by_reference,
    make_keys,
)

from quest_compile import ops
from quest_compile.ops import reference
from quest_compile.ops.cuda_providers import provider_of

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _native():
    if provider_of("sparse_decode") != "native":
        pytest.skip(f"no native CUDA kernels: {ops.native_status()}")


sizes = pytest.mark.parametrize(
    ("head_dim", "page_size"), [(8, 8), (80, 24), (64, 16), (128, 16), (128, 128), (256, 64)]
)


@all_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@sizes
def test_rows_have_the_bits_of_the_reference(dtype, bits, head_dim, page_size):
    for name in SKETCHED:
        keys = make_keys(name, dtype, head_dim)
        rows, scale = build(keys.cuda(), bits, page_size=page_size)
        expected_rows, expected_scale = build_by_reference(keys, bits, page_size=page_size)
        num_pages = LENGTH // page_size
        assert torch.equal(scale.cpu(), expected_scale), name
        assert torch.equal(rows[:, :, :num_pages].cpu(), expected_rows[:, :, :num_pages]), name


@all_bits
@pytest.mark.parametrize("group_reduce", ["sum", "max", "none"])
@sizes
def test_scores_agree_with_the_reference(bits, group_reduce, head_dim, page_size):
    for name in SKETCHED:
        keys = make_keys(name, torch.bfloat16, head_dim)
        rows, scale = (x.cuda() for x in build(keys, bits, page_size=page_size))
        query = torch.randn(2, 12, 1, head_dim).to("cuda", torch.bfloat16)
        settings = {"lengths": (LENGTH, 200), "group_reduce": group_reduce, "page_size": page_size}
        assert_scores_agree(query, rows, scale, bits, **settings)


@all_bits
def test_pages_chosen_are_those_of_the_reference(bits):
    """All but 1 % of them."""
    length = 16 * 2048
    keys = make_keys("heavy_channels", torch.bfloat16, 128, (1, 8, length)).cuda()
    rows, scale = build(keys, bits, length)
    query = torch.randn(1, 32, 1, 128).to("cuda", torch.bfloat16)
    kind = {"summary": "sketch", "sketch_bits": bits}
    length = torch.tensor([length], device="cuda")
    ours, theirs = (
        by(query, rows, length, scale, **kind).topk(128).indices[0].tolist()
        for by in (ops.score_pages, reference.score_pages)
    )
    same = sum(len(set(a) & set(b)) for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.99 * 8 * 128
