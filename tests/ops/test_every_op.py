"""What holds for all operators: registration, tracing, and bits that depend on nothing else."""

import dataclasses

import pytest
import torch
from hostile import PAPER, WAYS, Case, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from quest_compile import ops

CASES = (
    Case(torch.bfloat16, lengths=(500, 64, 333), max_seq_len=512, top_p=0.7),
    Case(torch.float32, 24, 80, 2, 7, 8, (100, 333, 16), 334, "gaps", "random", 5, **PAPER),
    Case(torch.float16, 128, 64, 1, 3, 24, (200, 900), 900, "gaps", "per_head", 6, **WAYS[1]),
    Case(torch.float32, 256, 256, 2, 3, 32, (1100, 1500), 1500, budget_pages=40, **WAYS[-1]),
)
cases = pytest.mark.parametrize("case", CASES, ids=str)
small_cases = pytest.mark.parametrize("case", CASES[:2], ids=str)


def call_of(name, inputs):
    """Arguments of the op: positional, keyword."""
    case = inputs.case
    page_size = {"page_size": case.page_size}
    if name == "score_pages":
        mask = (inputs.attn_mask,) if case.scores_tokens else ()
        tensors = (inputs.query, inputs.page_summary, inputs.seq_lens, *mask)
        return tensors, inputs.score_settings()
    if name == "select_pages":
        tensors = (inputs.scores(), inputs.seq_lens, inputs.attn_mask)
        settings = {**page_size, "score_scale": inputs.score_scale(), **inputs.shares()}
        return tensors, {**settings, "page_budget": case.budget_pages}
    if name == "attend_pages":
        pages = inputs.pages(inputs.scores())
        return (*inputs.sparse()[:3], pages, inputs.seq_lens, inputs.attn_mask), page_size
    if name == "sparse_decode":
        return inputs.sparse(), inputs.settings()
    if name == "dense_decode":
        return inputs.dense(), {"scale": 0.1}
    if name == "linear_decode":
        return linear_arguments(inputs), {}
    if name == "dense_prefill":
        query = torch.cat([inputs.query, inputs.query * 2, inputs.query * 3], 2)
        # Of all rows, and live in each.
        position = torch.arange(10, 13, device=query.device)
        return (query, *inputs.dense()[1:3], position, inputs.attn_mask), {"scale": 0.1}
    if name == "share_mask":
        return (inputs.live[:, :, None],), {}
    state = (torch.zeros_like(inputs.page_summary), torch.tensor([1], device=inputs.query.device))
    keys, values = (x.to(case.dtype) for x in inputs.clean()[1:])
    if name == "sparse_decode_step":
        position = inputs.seq_lens.max()[None] - 1
        lengths = (inputs.seq_lens, inputs.attn_mask)
        return (inputs.query, keys, values, position, *state, *lengths), inputs.settings()
    return (keys, inputs.seq_lens - 1, *state), case.page_format()


def linear_arguments(inputs):
    """A row per batch row; max_seq_len outputs."""
    case = inputs.case
    seeded = torch.Generator().manual_seed(0)
    weight = torch.randn(case.max_seq_len, case.head_dim, generator=seeded).to(case.dtype)
    return (
        inputs.query[:, 0].contiguous(),
        weight.to(inputs.query.device),
        weight[:, 0].to(inputs.query.device),
    )


# Those of audits and recordings: test_audit.py, test_recorded_decode.py.
NAMES = tuple(name for name in ops.OPERATORS if name not in ("audit", "recorded_decode"))
names = pytest.mark.parametrize("name", NAMES)
# Of the operators that write in place: which arguments.
WRITTEN = {"update_page_summary": slice(2, 4), "sparse_decode_step": slice(4, 6)}
pure_names = pytest.mark.parametrize("name", [name for name in NAMES if name not in WRITTEN])


def results(name, arguments, settings):
    """The outputs, and what was written in place."""
    if name in WRITTEN:
        arguments = copies_of(arguments)
    return outputs(name, getattr(ops, name)(*arguments, **settings), arguments)


def outputs(name, out, arguments):
    outs = () if out is None else out if isinstance(out, tuple) else (out,)
    return (*outs, *arguments[WRITTEN.get(name, slice(0))])


def copies_of(arguments):
    return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in arguments)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def rows_of(inputs, rows):
    """The same inputs with only these rows, in this order."""
    taken = {
        field.name: value[rows]
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), torch.Tensor)
    }
    lengths = tuple(inputs.case.lengths[row] for row in rows)
    case = dataclasses.replace(inputs.case, lengths=lengths)
    return dataclasses.replace(inputs, case=case, **taken)


@names
def test_native_kernel_is_registered_when_the_library_is_loaded(name, serves_natively):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"quest::{name}", "CPU") == serves_natively
    assert has_kernel(f"quest::{name}", "CompositeExplicitAutograd")
    assert has_kernel(f"quest::{name}", "Meta")


@names
@small_cases
def test_opcheck(name, case):
    arguments, settings = call_of(name, make_inputs(case))
    op = getattr(torch.ops.quest, name).default
    torch.library.opcheck(op, arguments, settings)


@names
@small_cases
def test_compiles_without_a_graph_break(name, case):
    arguments, settings = call_of(name, make_inputs(case))
    expected = results(name, arguments, settings)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
    arguments = copies_of(arguments)
    assert_same_bits(outputs(name, compiled(*arguments, **settings), arguments), expected)


@names
@small_cases
def test_one_graph_serves_every_max_seq_len(name, case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend=counter, dynamic=True)
    num_graphs = []
    for max_seq_len in (case.max_seq_len, 600, 777, 1000):
        inputs = make_inputs(dataclasses.replace(case, max_seq_len=max_seq_len))
        arguments, settings = call_of(name, inputs)
        expected = results(name, arguments, settings)
        out = compiled(*arguments, **settings)
        assert_same_bits(outputs(name, out, arguments), expected)
        num_graphs.append(counter.frame_count)
    assert len(set(num_graphs)) == 1


@names
@cases
def test_number_of_threads_changes_no_bit(name, case):
    arguments, settings = call_of(name, make_inputs(case))
    torch.set_num_threads(1)
    expected = results(name, arguments, settings)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert_same_bits(results(name, arguments, settings), expected)


@pure_names
@cases
def test_rest_of_the_batch_changes_no_bit(name, case):
    inputs = make_inputs(case)
    expected = results(name, *call_of(name, inputs))
    batch = len(case.lengths)
    for rows in ([0], [batch - 1], list(reversed(range(batch))), [1, 1, 0, 1]):
        actual = results(name, *call_of(name, rows_of(inputs, rows)))
        assert_same_bits(actual, [x[rows] for x in expected])


@pure_names
@cases
def test_second_call_gives_the_same_bits_and_arguments_are_left_alone(name, case):
    arguments, settings = call_of(name, make_inputs(case))
    before = copies_of(arguments)
    expected = results(name, arguments, settings)
    assert_same_bits(results(name, arguments, settings), expected)
    for x, y in zip(arguments, before, strict=True):
        if x is not None:
            assert_same_bits([x.contiguous()], [y.contiguous()])


@pytest.mark.cuda
@names
@cases
def test_never_waits_for_the_device(name, case):
    arguments, settings = call_of(name, make_inputs(case, "cuda"))
    expected = results(name, arguments, settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = results(name, arguments, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(actual, expected)
