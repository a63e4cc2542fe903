"""Calls with page sketches: composed of their parts, counted, checked."""

import pytest
import torch
from test_every_op import assert_same_bits
from test_sketch import LENGTH, MAX_SEQ_LEN, all_bits, build, make_keys

from quest_compile import ops


@all_bits
@pytest.mark.parametrize("mask", ["none", "shared", "per_head"])
def test_sparse_decode_is_score_select_attend(bits, mask):
    keys, values = make_keys("heavy_channels", torch.bfloat16), torch.randn(2, 3, MAX_SEQ_LEN, 64)
    caches, lengths = (keys, values.to(torch.bfloat16)), torch.tensor([LENGTH, 200])
    attn_mask = None
    if mask != "none":
        attn_mask = torch.rand(2, 12 if mask == "per_head" else 1, 1, MAX_SEQ_LEN) < 0.5
        attn_mask[:, :, :, 100:160] = True
    rows, scale = build(keys, bits)
    query = torch.randn(2, 12, 1, 64).to(torch.bfloat16)
    kind = {"summary": "sketch", "sketch_bits": bits, "scale": 0.2}
    out = ops.sparse_decode(query, *caches, rows, lengths, attn_mask, scale, budget=64, **kind)
    scores = ops.score_pages(query, rows, lengths, scale, attn_mask=attn_mask, **kind)
    pages = ops.select_pages(scores, lengths, attn_mask, page_budget=4)
    expected, _ = ops.attend_pages(query, *caches, pages, lengths, attn_mask, scale=0.2)
    assert torch.equal(out, expected)


def test_several_queries_select_as_if_each_came_alone():
    keys = make_keys("heavy_channels", torch.bfloat16)
    rows, scale = build(keys)
    query = torch.randn(2, 6, 3, 64).to(torch.bfloat16)
    settings = {"budget": 64, "summary": "sketch"}
    lengths = torch.tensor([LENGTH, 200])
    out = ops.sparse_decode(query, keys, keys, rows, lengths, None, scale, **settings)
    for i in range(3):
        one = query[:, :, i : i + 1]
        alone = ops.sparse_decode(one, keys, keys, rows, lengths - 2 + i, None, scale, **settings)
        assert torch.equal(out[:, :, i : i + 1], alone)


@pytest.mark.parametrize(("bits", "row_bytes"), [(1, 408), (2, 664)])
def test_bytes_read(bits, row_bytes):
    keys = make_keys("normal", torch.bfloat16, head_dim=128)
    query, lengths = torch.randn(2, 6, 1, 128).to(torch.bfloat16), torch.tensor([LENGTH])
    read = []
    for summary in ("minmax", "sketch"):
        built = ops.build_page_summary(keys, lengths, 16, summary, bits)
        rows, scale = (built, None) if summary == "minmax" else built
        ops.reset_counters()
        kind = {"summary": summary, "sketch_bits": bits}
        ops.sparse_decode(query, keys, keys, rows, lengths, None, scale, budget=64, **kind)
        read.append(ops.counters()["bytes_read"])
    # 20 complete pages of 3 KV heads of 2 rows.
    assert read[0] - read[1] == 20 * 6 * (512 - row_bytes)


def test_number_of_threads_changes_no_bit():
    keys = make_keys("heavy_tails", torch.bfloat16)
    query = torch.randn(2, 12, 1, 64).to(torch.bfloat16)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        rows, scale = build(keys)
        arguments = (query, keys, keys, rows, torch.tensor([LENGTH]), None, scale)
        out = ops.sparse_decode(*arguments, budget=64, summary="sketch")
        found.append((rows[:, :, :20], scale, out))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@all_bits
def test_opcheck(bits):
    keys = make_keys("normal", torch.bfloat16)
    rows, scale = build(keys, bits)
    query, lengths = torch.randn(2, 6, 1, 64).to(torch.bfloat16), torch.tensor([LENGTH])
    mask = torch.ones(1, 1, 1, MAX_SEQ_LEN, dtype=torch.bool)
    quest, kind = torch.ops.quest, {"summary": "sketch", "sketch_bits": bits}
    rows[:, :, 20:] = 0
    torch.library.opcheck(
        quest.score_pages.default,
        (query, rows, lengths, scale),
        {**kind, "attn_mask": mask, "scale": 0.2},
    )
    arguments = (query, keys, keys, rows, lengths, mask, scale)
    torch.library.opcheck(quest.sparse_decode.default, arguments, {"budget": 64, **kind})
    state, position = (rows, torch.tensor([20])), torch.tensor([LENGTH])
    torch.library.opcheck(quest.update_page_summary.default, (keys, position, *state, scale), kind)
    step = (query, keys, keys, position, *state, lengths + 1, mask, scale)
    torch.library.opcheck(quest.sparse_decode_step.default, step, {"budget": 64, **kind})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summary": "minmax"}, "page_summary"),
        ({"sketch_bits": 2}, "page_summary: expected .*bytes_per_page"),
        ({"sketch_bits": 3}, "sketch_bits: expected 1 or 2, got 3"),
        ({"sketch_bits": 0}, "sketch_bits: expected 1 or 2, got 0"),
        ({"channel_scale": None}, "channel_scale"),
        ({"channel_scale": torch.ones(2, 3, 64)}, "channel_scale: expected .*3, head_dim"),
        ({"channel_scale": torch.ones(2, 3, 3, 64).double()}, "channel_scale"),
    ],
)
def test_bad_arguments_name_themselves(change, message):
    keys = make_keys("normal", torch.bfloat16)
    rows, scale = build(keys)
    arguments = {
        "query": torch.randn(2, 6, 1, 64).to(torch.bfloat16),
        "key_cache": keys,
        "value_cache": keys,
        "page_summary": rows,
        "seq_lens": torch.tensor([LENGTH]),
        "channel_scale": scale,
        "budget": 64,
        "summary": "sketch",
    } | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.sparse_decode(**arguments)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.quest.sparse_decode(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask": torch.ones(1, 1, 1, MAX_SEQ_LEN)}, "attn_mask: expected dtype bool"),
        ({"attn_mask": torch.ones(1, 1, 1, 300, dtype=torch.bool)}, "positions of 25 pages"),
        ({"attn_mask": torch.ones(1, 5, 1, MAX_SEQ_LEN, dtype=torch.bool)}, "attn_mask"),
        ({"scale": float("inf")}, "scale: expected a finite number"),
    ],
)
def test_bad_arguments_of_scores_name_themselves(change, message):
    rows, scale = build(make_keys("normal", torch.bfloat16))
    query = torch.randn(2, 6, 1, 64).to(torch.bfloat16)
    arguments = (query, rows, torch.tensor([LENGTH]), scale)
    settings = {"summary": "sketch"} | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.score_pages(*arguments, **settings)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.quest.score_pages(*arguments, **settings)


@pytest.mark.parametrize("name", ["attn_mask", "scale"])
def test_only_sketches_take_a_mask_or_a_scale(name):
    keys = make_keys("normal", torch.bfloat16)
    summary = ops.build_page_summary(keys, torch.tensor([LENGTH]))
    value = 0.5 if name == "scale" else torch.ones(1, 1, 1, MAX_SEQ_LEN, dtype=torch.bool)
    arguments = (keys[:, :, :1], summary, torch.tensor([LENGTH]))
    with pytest.raises(ValueError, match=f"{name}: expected None with summary='minmax'"):
        ops.score_pages(*arguments, **{name: value})
    with pytest.raises((RuntimeError, ValueError), match=name):
        torch.ops.quest.score_pages(*arguments, **{name: value})
