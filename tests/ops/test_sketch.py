"""What is special to page sketches: rows byte by byte, the rotation, and how good estimates are."""

import pytest
import torch
from exact_scores import decoded_keys, query_codes, rotation, signs
from hostile import NAN, Case, every_dtype, make_inputs
from key_distributions import DISTRIBUTIONS, make_keys

from quest_compile import ops
from quest_compile.ops.summaries import sketch

every_bits = pytest.mark.parametrize("bits", [1, 2])


def build(keys, bits, page_size=16):
    lengths = torch.tensor([keys.shape[2]], device=keys.device)
    page_format = {"page_size": page_size, "summary": "sketch", "sketch_bits": bits}
    return ops.build_page_summary(keys, lengths, **page_format)


def case_of(keys, bits, **settings):
    """A sequence that fills a cache of these keys."""
    lengths = {"lengths": (keys.shape[2],), "max_seq_len": keys.shape[2]}
    return Case(keys.dtype, keys.shape[3], sketch_bits=bits, **lengths, **settings)


def test_signs_are_those_of_the_contract():
    """The first 64, and the same whatever head_dim is."""
    text = "".join("+" if x > 0 else "-" for x in sketch.signs(64))
    assert text == "".join("+" if x > 0 else "-" for x in signs(64))
    assert text == "+-++-++--+++-+---+--++-+-------+-+--+++-++--+--+---++-++++++++++"
    assert torch.equal(sketch.signs(24), sketch.signs(64)[:24])


@pytest.mark.parametrize(
    ("head_dim", "n"), [(8, 8), (24, 8), (64, 64), (80, 16), (96, 32), (256, 256)]
)
def test_rotation_is_orthogonal_up_to_n(head_dim, n):
    matrix = rotation(head_dim)
    assert torch.equal(matrix @ matrix.mT, n * torch.eye(head_dim).double())
    x = torch.randn(5, head_dim).double()
    torch.testing.assert_close(sketch.rotate(x), x @ matrix.mT)


@every_bits
def test_bytes_of_a_row_made_by_hand(bits, device):
    """Rotated, the mean is 127 in every channel, and the rest of a token is row 1 of Hadamard's
    matrix, + - + - ..., or its opposite."""
    is_plus = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    keys = torch.zeros(1, 1, 8, 8)
    keys[..., 0] = 127 * signs(8)[0]
    keys[..., 1] = torch.where(is_plus, signs(8)[1], -signs(8)[1])
    # Bit j of byte i is of channel 4 * j + i.
    plane = [3 * (is_plus[t] == (i % 2 == 0)) for t in range(8) for i in range(4)] + [0] * 32
    # Roots of mean squares: of the signs 1; all levels being outer ones of 1.5, two thirds.
    token_scale = {1: [0x80, 0x3F], 2: [0x2B, 0x3F]}[bits]
    row = plane + [127] * 8 + token_scale * 8 + [0, 0] * 8 + [0, 0, 0x80, 0x3F] + [0] * 20
    if bits == 2:
        # Outer and positive, or neither.
        row += plane
    assert build(keys.to(device), bits, page_size=8)[0, 0, 0].tolist() == row


@pytest.mark.parametrize(
    ("head_dim", "page_size", "sizes"),
    [(8, 8, (128, 192)), (64, 16, (256, 384)), (128, 16, (448, 704)), (80, 24, (576, 960)),
     (256, 128, (4672, 8768))],
)  # fmt: skip
def test_bytes_per_page(head_dim, page_size, sizes):
    keys = torch.zeros(1, 1, page_size, head_dim)
    assert tuple(build(keys, bits, page_size).shape[3] for bits in (1, 2)) == sizes


@every_bits
@every_dtype
def test_a_row_is_a_function_of_the_keys_of_its_page(bits, dtype, device):
    keys = make_keys("heavy_channels", (2, 3, 100, 64), dtype).to(device)
    alone = build(keys[1:, 2:, 32:48].float(), bits)
    keys[:, :, :32], keys[:, :, 48:], keys[0] = NAN, torch.inf, 0
    assert torch.equal(build(keys, bits)[1, 2, 2], alone[0, 0, 0])


@every_bits
@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_changes_nothing_of_the_others(bits, value, device):
    """Its scale is NaN, its bits are zero; the mean is that of the others."""
    keys = make_keys("spread_channels", (1, 1, 16, 64)).to(device)
    keys[0, 0, 5, 7] = value
    row = build(keys, bits)
    mean, rest = decoded_keys(row, case_of(keys, bits))
    assert rest[0, 0, 0].isnan().nonzero()[:, 0].unique().tolist() == [5]
    assert row[0, 0, 0, 128 + 64 + 10 : 128 + 64 + 12].tolist() == [0xC0, 0x7F]
    others = torch.arange(16, device=device) != 5
    exact = (keys[0, 0, others].double() @ rotation(64).to(device).mT).mean(0)
    largest = exact.abs().max()
    assert ((mean[0, 0, 0, 0] - exact).abs() <= largest / 253).all()
    for plane in (row[..., :128], row[..., 256:]):
        assert not plane.unflatten(-1, (-1, 16, 4))[..., 5, :].any()


@every_bits
@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_attended_unless_it_is_masked(bits, value):
    """As one is whose key overflowed float16."""
    inputs = make_inputs(Case(torch.float16, lengths=(333,), max_seq_len=400, sketch_bits=bits))
    inputs.key_cache[:, :, 40, 5] = value
    inputs.summarise()
    scores = inputs.scores()
    assert scores[:, :, 2].isnan().all() and scores[:, :, 3:20].isfinite().all()
    assert (inputs.pages(scores) == 2).any(-1).all()
    mask = torch.ones(1, 1, 1, 400, dtype=torch.bool)
    mask[..., 40] = False
    assert inputs.scores(attn_mask=mask)[:, :, :20].isfinite().all()


@every_bits
@every_dtype
def test_finite_keys_have_finite_scores(bits, dtype):
    """Sums of keys may overflow the dtype, and float32."""
    case = {"lengths": (320,), "max_seq_len": 320, "group_reduce": "none"}
    for name in DISTRIBUTIONS:
        inputs = make_inputs(Case(dtype, keys=name, sketch_bits=bits, **case))
        for size in (1.0, 1e-30):
            inputs.query *= size
            assert inputs.scores().isfinite().all(), name


@every_bits
@pytest.mark.parametrize("name", ["constant", "zero"])
def test_pages_that_are_alike_score_alike_and_the_first_are_chosen(bits, name):
    case = Case(torch.bfloat16, keys=name, lengths=(333,), max_seq_len=333, sketch_bits=bits)
    inputs = make_inputs(case)
    scores = inputs.scores()
    assert torch.equal(scores[:, :, :20], scores[:, :, :1].expand(-1, -1, 20))
    assert torch.equal(inputs.pages(scores), torch.tensor([0, 1, 19, 20]).int().expand(1, 2, 4))


def error_of(keys, bits):
    """Of the estimate of what is left of keys beside the mean of their page: root mean square,
    relative."""
    mean, rest = decoded_keys(build(keys, bits), case_of(keys, bits))
    pages = (keys.double() @ rotation(keys.shape[3]).mT).unflatten(2, (-1, 16))
    return float((mean + rest - pages).norm() / (pages - mean).norm())


def test_error_of_estimates():
    """With normal residuals, as rotated keys have, that of a sign and its root mean square is
    0.636, of the four even levels that fit best 0.345. A channel that is alone leaves one size."""
    for name in ("normal", "spread_channels", "one_heavy_channel", "changing", "tiny", "large",
                 "one_sided"):  # fmt: skip
        keys = make_keys(name, (2, 2, 640, 128))
        one, two = (error_of(keys, bits) for bits in (1, 2))
        assert two < 0.37 < 0.5 < one < 0.66, (name, one, two)
    for name in ("heavy_channels", "heavy_tails"):
        assert all(error_of(make_keys(name, (2, 2, 640, 128)), bits) < 0.66 for bits in (1, 2))


@every_bits
@pytest.mark.parametrize("name", ["normal", "spread_channels", "heavy_tails", "one_sided"])
def test_whole_numbers_of_queries_change_few_pages(bits, name):
    """Of those selected less than 2 %, against queries that are not rounded."""
    keys = make_keys(name, (1, 4, 16 * 512, 128), torch.bfloat16)
    case = case_of(keys, bits, num_kv_heads=4, group_reduce="none")
    inputs = make_inputs(case)
    inputs.key_cache = keys
    inputs.summarise()
    query = inputs.query.double().view(1, 4, 4, 128)
    mean, rest = decoded_keys(inputs.page_summary, case)
    rotated = query @ rotation(128).mT * 128**-1.5
    logits = torch.einsum("bkgd,bkptd->bkgpt", rotated, mean + rest)
    exact = logits.logsumexp(-1).flatten(1, 2).topk(64, -1).indices[0]
    found = inputs.scores().topk(64, -1).indices[0]
    same = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    assert sum(same) >= 0.98 * 16 * 64
    assert query_codes(query)[0].abs().max() == 127


@every_bits
@pytest.mark.parametrize(
    "name", ["normal", "spread_channels", "one_heavy_channel", "one_sided", "tiny", "large"]
)
def test_the_page_of_a_key_that_the_query_points_at_scores_highest(bits, name):
    keys = make_keys(name, (1, 1, 1600, 128))
    rows, lengths = build(keys, bits), torch.tensor([1600])
    centre = keys.mean(2, keepdim=True)
    variance = (keys - centre).square().mean()
    found = wanted = 0
    for token in range(0, 1600, 37):
        query = (keys[:, :, token : token + 1] - centre) / variance
        logits = (query @ keys.mT).unflatten(-1, (-1, 16)) * 128**-0.5
        if logits.logsumexp(-1).argmax() == token // 16:
            scores = ops.score_pages(query, rows, lengths, sketch_bits=bits)
            wanted += 1
            found += int(scores.argmax()) == token // 16
    assert wanted >= 38 and found >= 0.9 * wanted, (found, wanted)
