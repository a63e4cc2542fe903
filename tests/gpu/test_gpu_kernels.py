"""The native CUDA kernels on a GPU: what the emulation cannot tell. Operator tests with the
parameter ``device`` run there too."""

import pytest
import torch
from hostile import CASES, Case, every_case, every_format, make_inputs
from test_every_op import CASES as FEW_CASES
from test_every_op import assert_same_bits, call_of, results, rows_of
from test_sparse_decode_step import assert_same_state, state_of, step, two_calls

from quest_compile import ops
from quest_compile.ops.cuda_providers import provider_of

pytestmark = pytest.mark.cuda

NAMES = ("sparse_decode", "sparse_decode_step", "dense_decode", "attend_pages")
LONG_CASES = (
    Case(torch.bfloat16, 128, 128, 8, 4, lengths=(9000,), max_seq_len=32768, budget_pages=128),
    Case(torch.bfloat16, 128, 128, 2, 4, 16, (131_000,), 131_072, budget_pages=128),
)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)


@pytest.fixture(autouse=True)
def _native():
    if provider_of("sparse_decode") != "native":
        pytest.skip(f"no native CUDA kernels: {ops.native_status()}")


@pytest.mark.parametrize("name", NAMES)
@few_cases
def test_repeated_calls_give_the_same_bits(name, case):
    """CTAs come in another order every time."""
    arguments, settings = call_of(name, make_inputs(case, "cuda"))
    first = results(name, arguments, settings)
    for _ in range(20):
        assert_same_bits(results(name, arguments, settings), first)


@pytest.mark.parametrize("name", ["sparse_decode", "dense_decode", "attend_pages"])
@few_cases
def test_rest_of_the_batch_changes_no_bit(name, case):
    inputs = make_inputs(case, "cuda")
    expected = results(name, *call_of(name, inputs))
    for rows in ([0], [1, 1, 0, 1]):
        actual = results(name, *call_of(name, rows_of(inputs, rows)))
        assert_same_bits(actual, [x[rows] for x in expected])


@every_case
def test_summaries_have_the_bits_of_the_cpu(case):
    states = []
    for device in ("cpu", "cuda"):
        inputs = make_inputs(case, device)
        rows, num_sealed = state_of(inputs, 0, 0)
        position = torch.arange(min(case.lengths), device=device)
        keys = inputs.clean_keys.to(case.dtype)
        ops.update_page_summary(keys, position, rows, num_sealed, **case.page_format())
        states.append([rows.cpu(), num_sealed.cpu()])
    assert_same_state(*states)


def kernels_of(call):
    """Names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_a_sparse_step_is_scores_and_attention_and_nothing_else():
    case = Case(torch.bfloat16, 128, 128, 8, 4, lengths=(5000,), max_seq_len=8192, budget_pages=128)
    inputs = make_inputs(case, "cuda")
    state = state_of(inputs, 0, -1)
    position = inputs.seq_lens - 1
    names = kernels_of(lambda: step(inputs, position, state))
    assert len(names) == 2, names
    assert "score_kernel" in names[0] and "attend_kernel" in names[1]


@pytest.mark.parametrize("case", [*CASES, *FEW_CASES, *LONG_CASES], ids=str)
def test_a_repeated_step_gives_the_same_bits(case):
    """In whatever order its CTAs come."""
    inputs = make_inputs(case, "cuda")
    position = inputs.seq_lens.max()[None] - 1
    expected_state = state_of(inputs)
    expected = step(inputs, position, expected_state)
    for _ in range(5):
        state = state_of(inputs)
        assert torch.equal(step(inputs, position, state), expected)
        assert_same_state(state, expected_state)


@every_format
def test_foreign_writes_are_repaired(page_format):
    sizes = {"lengths": (500,) * 20, "max_seq_len": 512}
    inputs = make_inputs(Case(torch.bfloat16, 128, 128, 8, 4, **sizes, **page_format), "cuda")
    position = inputs.seq_lens[:1] - 1
    state, expected = (state_of(inputs, 0, -1) for _ in range(2))
    step(inputs, position, state)
    inputs.key_cache[1, 0] *= -3
    inputs.key_cache[0, 1, 30 * 16 : 31 * 16] += 5
    out = step(inputs, position + 1, state)
    assert torch.equal(out, step(inputs, position + 1, expected))
    assert state[1].tolist() == [31, -1]
    assert torch.equal(state[0][:, :, :31], expected[0][:, :, :31])


@every_format
def test_a_captured_step_follows_the_lengths_in_device_memory(page_format):
    """Decoding over page ends, the budget and a rollback, by replays of one graph."""
    sizes = {"lengths": (2048, 2048), "max_seq_len": 2048, "budget_pages": 16}
    inputs = make_inputs(Case(torch.bfloat16, 128, 128, 2, 4, **sizes, **page_format), "cuda")
    position = torch.tensor([199], device="cuda")
    inputs.seq_lens.fill_(200)
    state = state_of(inputs, 0, -1)
    graph = torch.cuda.CUDAGraph()
    step(inputs, position, state)  # kernels are loaded before the capture
    state[1].copy_(torch.tensor([0, -1]))
    with torch.cuda.graph(graph):
        out = step(inputs, position, state)
    expected = state_of(inputs, 0, -1)
    for length in (*range(240, 300), 1024, 1025, 290, 2048):
        position.fill_(length - 1)
        inputs.seq_lens.fill_(length)
        graph.replay()
        assert torch.equal(out, two_calls(inputs, position, expected)), length
        assert_same_state(state, expected)


def test_streams_do_not_disturb_each_other():
    """Two calls at a time have workspaces of their own."""
    case = Case(torch.bfloat16, 128, 128, 8, 4, lengths=(9000,), max_seq_len=9000)
    inputs = make_inputs(case, "cuda")
    expected = ops.sparse_decode(*inputs.sparse(), budget=1024)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outs = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            outs.append(ops.sparse_decode(*inputs.sparse(), budget=1024))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    inputs = make_inputs(Case(torch.bfloat16), "cuda:1")
    with torch.cuda.device(0):
        out = ops.dense_decode(*inputs.dense())
    assert out.device.index == 1 and out.isfinite().all()


@pytest.mark.parametrize("wild", [-5, 0, 10**12])
def test_lengths_out_of_range_are_clamped(wild):
    inputs = make_inputs(Case(torch.bfloat16, lengths=(128,), max_seq_len=128), "cuda")
    inputs.seq_lens = torch.tensor([min(max(wild, 1), 128)], device="cuda")
    expected = ops.sparse_decode(*inputs.sparse(), budget=64)
    inputs.seq_lens = torch.tensor([wild], device="cuda")
    assert torch.equal(ops.sparse_decode(*inputs.sparse(), budget=64), expected)
