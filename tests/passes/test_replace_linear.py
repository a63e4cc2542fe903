"""Which linear layers of a captured graph become quest::linear_decode, and why others do not."""

import pytest
import torch
from passes_layers import capture
from torch.nn.functional import linear

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.config import QuestConfig
from quest_compile.passes import LinearReason, run_passes

LINEAR_DECODE = torch.ops.quest.linear_decode.default
CONFIG = QuestConfig()


@pytest.fixture(autouse=True)
def _needs_kernels(serves_natively):
    if not serves_natively:
        pytest.skip("without kernels all is left to torch")


def weights(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(*shape, dtype=dtype))


def rewrite(function, *args, config=CONFIG):
    gm, example_inputs = capture(function, *args)
    return gm, example_inputs, run_passes(gm, config=config)


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        lambda x, w, b: linear(x, w),
        lambda x, w, b: linear(x, w, bias=b),
        lambda x, w, b: linear(input=x, weight=w, bias=b),
        lambda x, w, b: torch.ops.aten.linear.default(x, w, b),
        lambda x, w, b: x @ w.T,
        lambda x, w, b: torch.matmul(x, w.mT),
        lambda x, w, b: torch.mm(x[0], w.t()),
        lambda x, w, b: torch.addmm(b, x[0], w.transpose(0, 1)),
        lambda x, w, b: linear(x, w[:5]),
        lambda x, w, b: linear(linear(x, w[:8]), w[:, :8], b),
        lambda x, w, b: linear(x, w, b).relu() + linear(x * 2, w),
    ],
)
def test_a_layer_of_few_rows_is_replaced_and_gives_the_same_numbers(layer):
    arguments = torch.randn(1, 3, 16), weights(9, 16), weights(9)
    gm, example_inputs, rewritten = rewrite(layer, *arguments)
    found = targets(rewritten.gm)
    assert found.count(LINEAR_DECODE) == rewritten.linear.num_replaced >= 1
    assert not {linear, torch.mm, torch.addmm} & set(found) and not rewritten.linear.left
    assert LINEAR_DECODE not in targets(gm)
    (out,) = rewritten.gm(*example_inputs)
    torch.testing.assert_close(out, layer(*arguments))


@torch.no_grad()
def test_bytes_of_the_weights_are_counted():
    _, _, rewritten = rewrite(linear, torch.randn(2, 16), weights(9, 16))
    assert rewritten.linear.as_dict() == {"replaced": 1, "weight_bytes": 9 * 16 * 4, "left": {}}


def reason_of(function, *args):
    """Of the only layer, in a graph that is left alone."""
    gm, _, rewritten = rewrite(function, *args)
    assert rewritten.gm is gm
    ((reason, count),) = rewritten.linear.left.items()
    assert (count, rewritten.linear.num_replaced) == (1, 0)
    return reason


class Wrapped(torch.Tensor):
    """As quantised weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Wrapped(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrapped = [x.inner if isinstance(x, Wrapped) else x for x in args]
        return function(*unwrapped, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("reason", "x", "weight", "bias"),
    [
        (LinearReason.MANY_ROWS, torch.randn(9, 16), weights(4, 16), None),
        (LinearReason.MANY_ROWS, torch.randn(3, 3, 16), weights(4, 16), None),
        (LinearReason.DTYPE, torch.randn(1, 16).double(), weights(4, 16).double(), None),
        (LinearReason.LAYOUT, torch.randn(1, 12), weights(4, 12), None),
        (LinearReason.LAYOUT, torch.randn(1, 16), weights(16, 4).mT, None),
        (LinearReason.LAYOUT, torch.randn(1, 16), weights(4, 16), torch.randn(1)),
        (LinearReason.TENSOR_SUBCLASS, torch.randn(1, 16), Wrapped(torch.randn(4, 16)), None),
    ],
)
def test_what_is_left_to_torch_has_its_reason(reason, x, weight, bias):
    assert reason_of(linear, x, weight, bias) is reason


def test_gradients_are_left_alone():
    assert reason_of(linear, torch.randn(1, 16), weights(4, 16)) is LinearReason.GRADIENTS
    with torch.no_grad():
        assert rewrite(linear, torch.randn(1, 16), weights(4, 16))[2].linear.num_replaced == 1


@torch.no_grad()
def test_autocast_is_left_alone():
    def layer(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, weight)

    assert reason_of(layer, torch.randn(1, 16), weights(4, 16)) is LinearReason.DTYPE


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x @ (y * 2).mT,
        lambda x, y: torch.addmm(x.new_zeros(4), x, y.mT, beta=0.5),
        lambda x, y: torch.bmm(x[None], y.mT[None]),
    ],
)
def test_other_products_are_no_linear_layers(function):
    gm, _, rewritten = rewrite(function, torch.randn(1, 16), weights(4, 16))
    assert rewritten.gm is gm and not rewritten.linear.left


@torch.no_grad()
def test_the_setting_leaves_all_to_torch():
    config = QuestConfig(linear="torch")
    gm, _, rewritten = rewrite(linear, torch.randn(1, 16), weights(4, 16), config=config)
    assert rewritten.gm is gm and not rewritten.linear.left


@torch.no_grad()
def test_a_symbolic_number_of_rows_is_guarded():
    """One graph for up to 8 rows and one for more, each right."""
    weight = weights(4, 16)
    backend = QuestBackend(QuestConfig(inner="eager"))
    torch._dynamo.reset()
    step = torch.compile(linear, backend=backend, dynamic=True)
    for num_rows, is_replaced in ((20, 0), (9, 0), (8, 1), (2, 1), (30, 0), (5, 1)):
        x = torch.randn(num_rows, 16)
        ops.reset_counters()
        torch.testing.assert_close(step(x, weight), linear(x, weight))
        assert ops.counters()["linear_calls"] == is_replaced
    assert len(backend.report().graphs) == 2
