"""Every bad argument raises, by the checked function and by the bare operator, and is named."""

import dataclasses

import pytest
import torch
from hostile import Case, make_inputs

from quest_compile import ops

SKETCH = "sketch"
CASE = Case(torch.bfloat16, lengths=(100, 64), max_seq_len=128)


@dataclasses.dataclass(frozen=True)
class Bad:
    """``change`` makes one argument of a good call bad; ``says``: regex, if not just its name."""

    op: str
    name: str
    change: object
    says: str = ""
    summary: str = "minmax"

    def __str__(self):
        return f"{self.op}-{self.name}{'-sketch' if self.summary == SKETCH else ''}"


def good_arguments(op, summary="minmax"):
    """With sketches for the operators that take page summaries."""
    inputs = make_inputs(dataclasses.replace(CASE, summary=summary))
    arguments = _good_arguments(op, inputs)
    if summary == SKETCH and "page_summary" in arguments:
        arguments |= {"channel_scale": inputs.channel_scale, "summary": SKETCH}
    return arguments


def _good_arguments(op, inputs):
    arguments = {
        "query": inputs.query,
        "key_cache": inputs.key_cache,
        "value_cache": inputs.value_cache,
        "page_summary": inputs.page_summary,
        "seq_lens": inputs.seq_lens,
        "attn_mask": torch.ones(2, 1, 1, 128, dtype=torch.bool),
        "page_size": 16,
    }
    if op == "sparse_decode":
        return {**arguments, "budget": 64, "num_sink_pages": 1, "num_recent_pages": 2}
    if op == "dense_decode":
        return without(arguments, "page_summary", "page_size")
    if op == "attend_pages":
        pages = inputs.pages(inputs.scores())
        return {**without(arguments, "page_summary"), "page_indices": pages}
    if op == "score_pages":
        return without(arguments, "key_cache", "value_cache", "attn_mask")
    if op == "select_pages":
        arguments = without(arguments, "query", "key_cache", "value_cache", "page_summary")
        return {**arguments, "scores": inputs.scores(), "page_budget": 4}
    return {
        **without(arguments, "query", "value_cache", "seq_lens", "attn_mask"),
        "cache_position": torch.tensor([99]),
        "num_sealed": torch.tensor([6]),
    }


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


def bads_of_page_counts(op, budget, pages):
    """``budget``: the argument that sets the page budget; ``pages``: what one page of it is."""
    return [
        Bad(op, budget, becomes(0)),
        Bad(op, budget, becomes(-64)),
        Bad(op, budget, becomes(3 * pages - 1)),
        Bad(op, "num_sink_pages", becomes(-1)),
        Bad(op, "num_sink_pages", becomes(3), budget),
        Bad(op, "num_recent_pages", becomes(0)),
        Bad(op, "num_recent_pages", becomes(4), budget),
    ]


def bads_of_summary(op):
    return [
        Bad(op, "page_summary", lambda x: x.to("meta")),
        Bad(op, "page_summary", torch.Tensor.float),
        Bad(op, "page_summary", lambda x: x[0]),
        Bad(op, "page_summary", lambda x: x[:, :, :, :1]),
        Bad(op, "page_summary", lambda x: x[..., :56]),
        Bad(op, "page_summary", lambda x: x[:1]),
        Bad(op, "page_summary", lambda x: x.transpose(3, 4).contiguous().transpose(3, 4)),
        Bad(op, "page_summary", lambda x: torch.stack([x, x], -2)[..., 0, :]),
    ]


def bads_of_sketches(op):
    """What only sketches are wrong with."""

    def bad(name, change, says=""):
        return Bad(op, name, change, says, SKETCH)

    return [
        bad("page_summary", lambda x: x.to("meta")),
        bad("page_summary", lambda x: x.view(torch.int8)),
        bad("page_summary", torch.Tensor.float),
        bad("page_summary", lambda x: x[0]),
        bad("page_summary", lambda x: x[:1]),
        bad("page_summary", lambda x: x[:, :1], "page_summary|channel_scale"),
        bad("page_summary", lambda x: x[..., :-4]),
        bad("page_summary", lambda x: x.mT.contiguous().mT),
        bad("page_summary", lambda x: x.repeat_interleave(2, -1)[..., ::2]),
        bad("page_summary", lambda _: torch.zeros(2, 2, 8, 2, 64, dtype=torch.bfloat16)),
        bad("channel_scale", becomes(None)),
        bad("channel_scale", torch.Tensor.double),
        bad("channel_scale", torch.Tensor.bfloat16),
        bad("channel_scale", lambda x: x.to("meta")),
        bad("channel_scale", lambda x: x[0]),
        bad("channel_scale", lambda x: x[:1]),
        bad("channel_scale", lambda x: x[:, :1]),
        bad("channel_scale", lambda x: x[..., :56]),
        bad("channel_scale", lambda x: x[..., None]),
        bad("channel_scale", lambda x: x.mT.contiguous().mT),
        bad("summary", becomes("minmax"), "page_summary"),
        bad("summary", becomes("int4"), "int4"),
        bad("summary", becomes("")),
    ]


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
        Bad(op, "key_cache", lambda x: x[:, :1], "value_cache"),
        Bad(op, "value_cache", lambda x: x[:, :1]),
        Bad(op, "value_cache", lambda x: x[:, :, :127]),
        Bad(op, "value_cache", lambda x: x.repeat(1, 1, 1, 5)),
        Bad(op, "query", torch.Tensor.float, "dtype"),
        Bad(op, "query", torch.Tensor.double),
        Bad(op, "query", lambda x: x[..., 0, :]),
        Bad(op, "query", lambda x: x[:, :, :0], "query|q_len"),
        Bad(op, "query", lambda x: x[:, :7]),
        Bad(op, "query", lambda x: x[..., :56], "key_cache"),
        Bad(op, "query", lambda x: x[..., :60]),
        Bad(op, "query", lambda x: x.repeat(2, 1, 1, 1), "batch|key_cache"),
    ]


BAD = (
    *bads_of_attention("sparse_decode"),
    *bads_of_mask("sparse_decode"),
    *bads_of_seq_lens("sparse_decode"),
    *bads_of_summary("sparse_decode"),
    *bads_of_page_size("sparse_decode"),
    *bads_of_page_counts("sparse_decode", "budget", 16),
    Bad("sparse_decode", "page_summary", lambda x: x[:, :, :7]),
    Bad("sparse_decode", "group_reduce", becomes("mean"), "mean"),
    Bad("sparse_decode", "group_reduce", becomes("")),
    Bad("sparse_decode", "scale", becomes(float("nan"))),
    Bad("sparse_decode", "query", lambda x: x.expand(2, 8, 65, 64), "seq_lens"),
    *bads_of_attention("dense_decode"),
    *bads_of_mask("dense_decode"),
    *bads_of_seq_lens("dense_decode"),
    Bad("dense_decode", "scale", becomes(float("inf"))),
    Bad("dense_decode", "query", lambda x: x.expand(2, 8, 65, 64), "seq_lens"),
    *bads_of_attention("attend_pages"),
    *bads_of_mask("attend_pages"),
    *bads_of_seq_lens("attend_pages"),
    *bads_of_page_size("attend_pages"),
    Bad("attend_pages", "query", lambda x: x.expand(2, 8, 2, 64), "q_len"),
    Bad("attend_pages", "page_indices", torch.Tensor.long),
    Bad("attend_pages", "page_indices", lambda x: x[0]),
    Bad("attend_pages", "page_indices", lambda x: x[:1]),
    Bad("attend_pages", "page_indices", lambda x: x.repeat(1, 2, 1)),
    Bad("attend_pages", "page_indices", lambda x: x.to("meta")),
    *bads_of_summary("score_pages"),
    *bads_of_seq_lens("score_pages"),
    *bads_of_page_size("score_pages"),
    Bad("score_pages", "group_reduce", becomes("min"), "min"),
    Bad("score_pages", "query", torch.Tensor.double),
    Bad("score_pages", "query", lambda x: x.expand(2, 8, 3, 64), "q_len"),
    Bad("score_pages", "query", lambda x: x[:, :5]),
    *bads_of_seq_lens("select_pages"),
    *bads_of_page_size("select_pages"),
    *bads_of_page_counts("select_pages", "page_budget", 1),
    Bad("select_pages", "scores", torch.Tensor.double),
    Bad("select_pages", "scores", lambda x: x[0]),
    Bad("select_pages", "scores", lambda x: x[:, :0]),
    Bad("select_pages", "attn_mask", torch.Tensor.float, "bool"),
    Bad("select_pages", "attn_mask", lambda x: x[0]),
    Bad("select_pages", "attn_mask", lambda x: x[..., :100]),
    Bad("select_pages", "attn_mask", lambda x: x.expand(2, 3, 1, 128)),
    Bad("select_pages", "attn_mask", lambda x: x.repeat(2, 1, 1, 1)),
    *bads_of_summary("update_page_summary"),
    *bads_of_page_size("update_page_summary"),
    Bad("update_page_summary", "page_summary", lambda x: x[:, :, :7]),
    Bad("update_page_summary", "key_cache", torch.Tensor.double),
    Bad("update_page_summary", "key_cache", lambda x: x[0]),
    Bad("update_page_summary", "key_cache", lambda x: x.mT.contiguous().mT),
    Bad("update_page_summary", "cache_position", becomes(torch.tensor([-1]))),
    Bad("update_page_summary", "cache_position", becomes(torch.tensor([5, 128]))),
    Bad("update_page_summary", "cache_position", torch.Tensor.int),
    Bad("update_page_summary", "cache_position", lambda x: x[None]),
    Bad("update_page_summary", "cache_position", lambda x: x[:0]),
    Bad("update_page_summary", "num_sealed", torch.Tensor.int),
    Bad("update_page_summary", "num_sealed", lambda x: x.repeat(3)),
    Bad("update_page_summary", "num_sealed", lambda x: x[0]),
    Bad("update_page_summary", "num_sealed", lambda x: x.to("meta")),
    *bads_of_sketches("sparse_decode"),
    *bads_of_sketches("score_pages"),
    *bads_of_sketches("update_page_summary"),
    Bad("sparse_decode", "channel_scale", lambda _: torch.ones(2, 2, 64)),
    Bad("score_pages", "summary", becomes(SKETCH), "page_summary"),
)


def arguments_of(bad):
    arguments = good_arguments(bad.op, bad.summary)
    arguments[bad.name] = bad.change(arguments.get(bad.name))
    return arguments


@pytest.mark.parametrize("summary", ["minmax", SKETCH])
@pytest.mark.parametrize("op", sorted({bad.op for bad in BAD}))
def test_good_call_passes(op, summary):
    getattr(ops, op)(**good_arguments(op, summary))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_checked_function_raises(bad):
    with pytest.raises((ValueError, TypeError), match=bad.says or bad.name):
        getattr(ops, bad.op)(**arguments_of(bad))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_operator_raises(bad):
    with pytest.raises((RuntimeError, ValueError), match=bad.says or bad.name):
        getattr(torch.ops.quest, bad.op)(**arguments_of(bad))


BAD_UPDATES = [
    bad
    for bad in BAD
    if bad.op == "update_page_summary" and bad.name not in ("page_summary", "num_sealed")
]


@pytest.mark.parametrize("bad", BAD_UPDATES, ids=lambda bad: bad.name)
def test_bad_update_leaves_the_state_alone(bad):
    arguments = arguments_of(bad)
    summary, num_sealed = arguments["page_summary"].clone(), arguments["num_sealed"].clone()
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.quest.update_page_summary(**arguments)
    assert torch.equal(arguments["num_sealed"], num_sealed)
    assert torch.equal(arguments["page_summary"].view(torch.uint8), summary.view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "value"),
    [("query", None), ("seq_lens", 100), ("budget", 64.0), ("budget", True), ("page_size", "16")],
)
def test_argument_of_another_type_is_a_type_error(name, value):
    arguments = {**good_arguments("sparse_decode"), name: value}
    with pytest.raises(TypeError, match=name):
        ops.sparse_decode(**arguments)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.ops.quest.sparse_decode(**arguments)


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
