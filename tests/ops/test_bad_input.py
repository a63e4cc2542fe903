"""Every bad argument raises before anything is written, by the checked function and by the bare
operator, and is named first: "name: expected ..., got ..."."""

import dataclasses

import pytest
import torch
from hostile import NAN, Case, make_inputs

from quest_compile import ops

INF = float("inf")
CASE = Case(torch.bfloat16, lengths=(100, 64), max_seq_len=128)


@dataclasses.dataclass(frozen=True)
class Bad:
    """``change`` makes one argument of a good call bad; ``says``: regex, if not just its name.
    ``summary``: of the call, where it takes one."""

    op: str
    name: str
    change: object
    says: str = ""
    summary: str = "sketch"

    @property
    def pattern(self):
        return self.says or f"{self.name}: (expected|got)"

    def __str__(self):
        return f"{self.op}-{self.name}{'-minmax' if self.summary == 'minmax' else ''}"


def good_arguments(op, summary="sketch"):
    inputs = make_inputs(dataclasses.replace(CASE, summary=summary))
    arguments = {
        "query": inputs.query,
        "key_cache": inputs.key_cache,
        "value_cache": inputs.value_cache,
        "page_summary": inputs.page_summary,
        "seq_lens": inputs.seq_lens,
        "attn_mask": torch.ones(2, 1, 1, 128, dtype=torch.bool),
        **inputs.case.page_format(),
    }
    written = {"cache_position": torch.tensor([99]), "num_sealed": torch.tensor([6])}
    if op == "sparse_decode":
        return {**arguments, **inputs.settings()}
    if op == "sparse_decode_step":
        return {**arguments, **inputs.settings(), **written}
    if op == "score_pages":
        return {**without(arguments, "key_cache", "value_cache"), "scale": 0.2}
    if op == "update_page_summary":
        return {**without(arguments, "query", "value_cache", "seq_lens", "attn_mask"), **written}
    arguments = without(arguments, "page_summary", "summary", "sketch_bits")
    if op == "dense_decode":
        return without(arguments, "page_size")
    if op == "dense_prefill":
        return {**without(arguments, "page_size", "seq_lens"), "cache_position": torch.tensor([99])}
    if op == "attend_pages":
        return {**arguments, "page_indices": inputs.pages(inputs.scores())}
    arguments = without(arguments, "query", "key_cache", "value_cache")
    return {**arguments, "scores": inputs.scores(), "page_budget": 4}


def without(arguments, *names):
    return {name: value for name, value in arguments.items() if name not in names}


def becomes(value):
    return lambda _: value


def bads_of_seq_lens(op):
    return [
        Bad(op, "seq_lens", becomes(torch.tensor([100, 0])), "got 0"),
        Bad(op, "seq_lens", becomes(torch.tensor([-1, 100])), "got -1"),
        Bad(op, "seq_lens", becomes(torch.tensor([129, 100])), "got 129"),
        Bad(op, "seq_lens", becomes(torch.tensor([100, 2**31 - 1], dtype=torch.int32))),
        Bad(op, "seq_lens", becomes(torch.tensor([100, 100, 100]))),
        Bad(op, "seq_lens", becomes(torch.tensor([[100, 100]]))),
        Bad(op, "seq_lens", becomes(torch.tensor(100))),
        Bad(op, "seq_lens", becomes(torch.tensor([], dtype=torch.int64))),
        Bad(op, "seq_lens", torch.Tensor.float),
        Bad(op, "seq_lens", torch.Tensor.short),
        Bad(op, "seq_lens", lambda x: x.to("meta")),
    ]


def bads_of_mask(op):
    return [
        Bad(op, "attn_mask", torch.Tensor.float, "bool"),
        Bad(op, "attn_mask", torch.Tensor.byte, "bool"),
        Bad(op, "attn_mask", lambda x: x[0]),
        Bad(op, "attn_mask", lambda x: x[..., :100]),
        Bad(op, "attn_mask", lambda x: x.expand(2, 3, 1, 128)),
        Bad(op, "attn_mask", lambda x: x.expand(2, 1, 2, 128)),
        Bad(op, "attn_mask", lambda x: x.repeat(2, 1, 1, 1)),
        Bad(op, "attn_mask", lambda x: x.to("meta")),
    ]


def bads_of_page_size(op):
    return [Bad(op, "page_size", becomes(value)) for value in (0, -16, 1, 12, 17, 136, 256)]


def bads_of_selection(op, budget, pages):
    """``budget``: the argument that sets the page budget; ``pages``: what one page of it is."""
    return [
        Bad(op, budget, becomes(0)),
        Bad(op, budget, becomes(-64)),
        Bad(op, budget, becomes(3 * pages - 1)),
        Bad(op, "num_sink_pages", becomes(-1)),
        Bad(op, "num_sink_pages", becomes(3), f"{budget}: expected"),
        Bad(op, "num_recent_pages", becomes(0)),
        Bad(op, "num_recent_pages", becomes(4), f"{budget}: expected"),
        *(Bad(op, "budget_fraction", becomes(value)) for value in (0.0, 1.5, NAN)),
        *(Bad(op, "top_p", becomes(value)) for value in (0.0, -1.0, 1.01, NAN)),
    ]


def bads_of_reduction(op):
    return [
        *(Bad(op, "group_reduce", becomes(value)) for value in ("", "max", "mean")),
        Bad(op, "group_reduce", becomes("max"), "got 'max'", "minmax"),
        Bad(
            op,
            "group_reduce",
            becomes("sum"),
            "group_reduce: expected 'softmax' or 'none' with summary='sketch', got 'sum'",
        ),
    ]


def bads_of_format(op):
    sketches = [
        Bad(op, "page_summary", lambda x: x.to("meta")),
        Bad(op, "page_summary", lambda x: x.view(torch.int8)),
        Bad(op, "page_summary", torch.Tensor.float),
        Bad(op, "page_summary", lambda x: x[0]),
        Bad(op, "page_summary", lambda x: x[:1]),
        Bad(op, "page_summary", lambda x: x[..., :-4]),
        Bad(op, "page_summary", lambda x: x.mT.contiguous().mT),
        Bad(op, "page_summary", lambda x: x.repeat_interleave(2, -1)[..., ::2]),
        Bad(op, "page_summary", lambda _: torch.zeros(2, 2, 8, 2, 64, dtype=torch.bfloat16)),
        Bad(op, "summary", becomes("minmax"), "page_summary: "),
        *(Bad(op, "summary", becomes(value)) for value in ("int4", "")),
        *(Bad(op, "sketch_bits", becomes(value)) for value in (0, 3)),
        Bad(op, "sketch_bits", becomes(1), "page_summary: expected"),
    ]
    bounds = [
        Bad(op, "page_summary", change, summary="minmax")
        for change in (
            lambda x: x.to("meta"),
            torch.Tensor.float,
            lambda x: x[0],
            lambda x: x[:, :, :, :1],
            lambda x: x[..., :56],
            lambda x: x[:1],
            lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
            lambda x: torch.stack([x, x], -2)[..., 0, :],
        )
    ]
    wrong = Bad(op, "summary", becomes("sketch"), "page_summary: expected", "minmax")
    return [*sketches, *bounds, wrong, *bads_of_page_size(op)]


def bads_of_attention(op):
    caches = [
        Bad(op, name, change)
        for name in ("key_cache", "value_cache")
        for change in (
            torch.Tensor.float,
            torch.Tensor.half,
            lambda x: x[0],
            lambda x: x[:1],
            lambda x: x[..., :60],
            lambda x: x.mT.contiguous().mT,
            lambda x: x.repeat_interleave(2, -1)[..., ::2],
            lambda x: x.to("meta"),
        )
    ]
    return [
        *caches,
        Bad(op, "key_cache", lambda x: x[:, :1], "value_cache: expected"),
        Bad(op, "value_cache", lambda x: x[:, :1]),
        Bad(op, "value_cache", lambda x: x[:, :, :127]),
        Bad(op, "value_cache", lambda x: x.repeat(1, 1, 1, 5)),
        Bad(op, "query", torch.Tensor.float, "(query|key_cache): expected dtype"),
        Bad(op, "query", torch.Tensor.double),
        Bad(op, "query", lambda x: x[..., 0, :]),
        Bad(op, "query", lambda x: x[:, :, :0]),
        Bad(op, "query", lambda x: x[:, :7]),
        Bad(op, "query", lambda x: x[..., :56], "key_cache: expected"),
        Bad(op, "query", lambda x: x[..., :60]),
        Bad(op, "query", lambda x: x.repeat(2, 1, 1, 1), "(key_cache|seq_lens): expected"),
    ]


def bads_of_write(op):
    return [
        Bad(op, "cache_position", becomes(torch.tensor([-1]))),
        Bad(op, "cache_position", becomes(torch.tensor([5, 128]))),
        Bad(op, "cache_position", torch.Tensor.int),
        Bad(op, "cache_position", lambda x: x[None]),
        Bad(op, "cache_position", lambda x: x[:0]),
        Bad(op, "num_sealed", torch.Tensor.int),
        Bad(op, "num_sealed", lambda x: x.repeat(3)),
        Bad(op, "num_sealed", lambda x: x[0]),
        Bad(op, "num_sealed", lambda x: x.to("meta")),
    ]


BAD = (
    *bads_of_attention("sparse_decode"),
    *bads_of_mask("sparse_decode"),
    *bads_of_seq_lens("sparse_decode"),
    *bads_of_format("sparse_decode"),
    *bads_of_selection("sparse_decode", "budget", 16),
    *bads_of_reduction("sparse_decode"),
    Bad("sparse_decode", "page_summary", lambda x: x[:, :, :7]),
    Bad("sparse_decode", "page_summary", lambda x: x[:, :1]),
    Bad("sparse_decode", "scale", becomes(NAN)),
    Bad("sparse_decode", "query", lambda x: x.expand(2, 8, 65, 64), "seq_lens: expected"),
    *bads_of_attention("dense_decode"),
    *bads_of_mask("dense_decode"),
    *bads_of_seq_lens("dense_decode"),
    Bad("dense_decode", "scale", becomes(INF)),
    Bad("dense_decode", "query", lambda x: x.expand(2, 8, 65, 64), "seq_lens: expected"),
    *bads_of_attention("dense_prefill"),
    *bads_of_mask("dense_prefill"),
    Bad("dense_prefill", "cache_position", becomes(torch.tensor([-1]))),
    Bad("dense_prefill", "cache_position", becomes(torch.tensor([128]))),
    Bad("dense_prefill", "cache_position", torch.Tensor.short),
    Bad("dense_prefill", "cache_position", lambda x: x[None]),
    Bad("dense_prefill", "cache_position", lambda x: x.repeat(2)),
    Bad("dense_prefill", "cache_position", lambda x: x.to("meta")),
    Bad("dense_prefill", "scale", becomes(NAN)),
    *bads_of_attention("attend_pages"),
    *bads_of_mask("attend_pages"),
    *bads_of_seq_lens("attend_pages"),
    *bads_of_page_size("attend_pages"),
    Bad("attend_pages", "query", lambda x: x.expand(2, 8, 2, 64), "query: expected q_len"),
    Bad("attend_pages", "page_indices", torch.Tensor.long),
    Bad("attend_pages", "page_indices", lambda x: x[0]),
    Bad("attend_pages", "page_indices", lambda x: x[:1]),
    Bad("attend_pages", "page_indices", lambda x: x.repeat(1, 2, 1)),
    Bad("attend_pages", "page_indices", lambda x: x.to("meta")),
    *bads_of_format("score_pages"),
    *bads_of_seq_lens("score_pages"),
    *bads_of_mask("score_pages"),
    *bads_of_reduction("score_pages"),
    Bad("score_pages", "scale", becomes(INF)),
    Bad("score_pages", "query", torch.Tensor.double),
    Bad("score_pages", "query", lambda x: x.expand(2, 8, 3, 64), "query: expected q_len"),
    Bad("score_pages", "query", lambda x: x[:, :5]),
    Bad("score_pages", "group_reduce", becomes("none"), "attn_mask: expected", "minmax"),
    Bad("score_pages", "group_reduce", becomes("sum"), "attn_mask: expected", "minmax"),
    *bads_of_seq_lens("select_pages"),
    *bads_of_page_size("select_pages"),
    *bads_of_selection("select_pages", "page_budget", 1),
    *(Bad("select_pages", "score_scale", becomes(value)) for value in (INF, NAN)),
    Bad("select_pages", "scores", torch.Tensor.double),
    Bad("select_pages", "scores", lambda x: x[0]),
    Bad("select_pages", "scores", lambda x: x[:, :0]),
    *bads_of_mask("select_pages"),
    *bads_of_format("update_page_summary"),
    Bad("update_page_summary", "page_summary", lambda x: x[:, :, :7]),
    Bad("update_page_summary", "page_summary", lambda x: x[:, :1]),
    Bad("update_page_summary", "key_cache", torch.Tensor.double),
    Bad("update_page_summary", "key_cache", lambda x: x[0]),
    Bad("update_page_summary", "key_cache", lambda x: x.mT.contiguous().mT),
    *bads_of_write("update_page_summary"),
    *bads_of_write("sparse_decode_step"),
    Bad("sparse_decode_step", "budget", becomes(0)),
    Bad("sparse_decode_step", "page_size", becomes(12)),
    Bad("sparse_decode_step", "seq_lens", becomes(torch.tensor([1, 2, 3]))),
    Bad("sparse_decode_step", "summary", becomes("minmax_int4")),
)
OPS = sorted({bad.op for bad in BAD})


def arguments_of(bad):
    arguments = good_arguments(bad.op, bad.summary)
    arguments[bad.name] = bad.change(arguments.get(bad.name))
    return arguments


def bits_of(arguments):
    return [
        x.detach().contiguous().view(torch.uint8).clone()
        for x in arguments.values()
        if isinstance(x, torch.Tensor) and x.dim() > 0 and not x.is_meta
    ]


@pytest.mark.parametrize("summary", ["minmax", "sketch"])
@pytest.mark.parametrize("op", OPS)
def test_good_call_passes(op, summary):
    getattr(ops, op)(**good_arguments(op, summary))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_argument_is_named_and_nothing_is_written(bad):
    arguments = arguments_of(bad)
    before = bits_of(arguments)
    with pytest.raises((ValueError, TypeError), match=bad.pattern):
        getattr(ops, bad.op)(**arguments)
    with pytest.raises((RuntimeError, ValueError), match=bad.pattern):
        getattr(torch.ops.quest, bad.op)(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(bits_of(arguments), before, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", None),
        ("seq_lens", 100),
        ("budget", 64.0),
        ("budget", True),
        ("page_size", "16"),
        ("top_p", "0.9"),
    ],
)
def test_argument_of_another_type_is_a_type_error(name, value):
    arguments = {**good_arguments("sparse_decode"), name: value}
    with pytest.raises(TypeError, match=name):
        ops.sparse_decode(**arguments)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.ops.quest.sparse_decode(**arguments)


@pytest.mark.parametrize("summary", ["mean", ""])
def test_another_kind_of_summary_to_build(summary):
    with pytest.raises(ValueError, match="summary: expected one of 'minmax', 'sketch', got"):
        ops.build_page_summary(torch.zeros(1, 1, 16, 8), torch.tensor([16]), summary=summary)


def test_seq_len_beyond_the_cache_to_build():
    with pytest.raises(ValueError, match="seq_lens: expected values from 1 to 16, got 17"):
        ops.build_page_summary(torch.zeros(1, 1, 16, 8), torch.tensor([17]))


def test_message_says_what_was_expected_and_what_came():
    with pytest.raises(ValueError) as error:
        ops.sparse_decode(**{**good_arguments("sparse_decode"), "page_size": 12})
    assert str(error.value) == "page_size: expected a multiple of 8 from 8 to 128, got 12"


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, r"shape \[1\], got \[3\]"), (2, r"shape \[1\] or \[2\], got \[3\]")]
)
def test_a_native_message_gives_each_shape_once(batch, expected, serves_natively):
    if not serves_natively:
        pytest.skip("the checks in Python have a text of their own")
    inputs = make_inputs(Case(torch.bfloat16, lengths=(100,) * batch, max_seq_len=128))
    lengths = torch.tensor([100, 100, 100])
    with pytest.raises(RuntimeError, match=f"seq_lens: expected {expected}"):
        torch.ops.quest.dense_decode(inputs.query, inputs.key_cache, inputs.value_cache, lengths)
