"""A GPU that is not there, for what is written for one: CUDA tensors that are CPU tensors inside.

Operators ``quest::*`` of such tensors are answered by the emulated CUDA kernels, everything else by
torch on the CPU, those of CPU tensors by the CPU kernels. A CPU tensor among CUDA tensors is an
error, as on a GPU; what a CUDA graph captures does not change anything before it is replayed.
"""

import contextlib

import torch
from emulated_library import NAMES
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from quest_compile.ops import cuda_providers
from quest_compile.ops.counters import count_cuda_call

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ANYWHERE = ("aten::copy_", "aten::index", "aten::index_put_")
_capturing = []


class CudaTensor(torch.Tensor):
    """``inner`` is its memory. For C++ it is on the CPU, which has no code for other devices."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=inner.device
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __repr__(self):
        return f"CudaTensor({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    def cpu(self):
        return self.inner.clone()

    def to(self, *args, **kwargs):
        if any(_is("cpu", x) for x in (*args, *kwargs.values())):
            return self.inner.to(*args, **kwargs).clone()
        return torch.Tensor.to(self, *_on_cpu(args), **_on_cpu(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        _refuse_cpu_tensors(func, args, kwargs)
        call = _kernel_of(func)
        inner_args, inner_kwargs = _inner(args), _inner(kwargs)
        if _capturing and not func.is_view:
            out = _capturing[-1].record(call, inner_args, inner_kwargs)
        else:
            if call is not func:  # the emulated library has counters of its own
                count_cuda_call(func._schema.name.split("::")[1], args, kwargs)
            out = call(*inner_args, **inner_kwargs)
        if func._schema.returns and _is_written(func._schema.returns[0]):
            return args[0]
        return tree_map_only(torch.Tensor, CudaTensor, out)


class StandIn(TorchFunctionMode):
    """Makes tensors of the device "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return CudaTensor(args[0].clone())
        if func is torch.Tensor.to:
            wanted = (*args[1:], *kwargs.values())
            if any(_is("cuda", x) or isinstance(x, CudaTensor) for x in wanted):
                return CudaTensor(func(*_on_cpu(_inner(args)), **_on_cpu(kwargs)).clone())
        elif _is("cuda", kwargs.get("device")):
            out = func(*args, **_on_cpu(kwargs))
            return out if isinstance(out, CudaTensor) else CudaTensor(out)
        return func(*args, **kwargs)


class Graph:
    """What was called while it was captured, to be called again."""

    def __init__(self):
        self.calls = []

    def record(self, call, args, kwargs):
        out = call(*tree_map_only(torch.Tensor, torch.clone, args), **kwargs)
        self.calls.append((call, args, kwargs, out))
        return out

    def replay(self):
        for call, args, kwargs, out in self.calls:
            new = tree_leaves(call(*args, **kwargs))
            for memory, value in zip(tree_leaves(out), new, strict=True):
                if isinstance(memory, torch.Tensor):
                    memory.copy_(value)


class Stream:
    def wait_stream(self, other):
        """One after the other they are anyway."""


class Event:
    """``elapsed_time`` in milliseconds, whatever was done."""

    def __init__(self, enable_timing=False):
        self.enable_timing = enable_timing

    def record(self):
        assert self.enable_timing

    def elapsed_time(self, end):
        return 1.0


@contextlib.contextmanager
def _capture(graph, stream=None):
    _capturing.append(graph)
    try:
        yield
    finally:
        _capturing.pop()


def install(monkeypatch):
    """``torch.cuda`` as far as it is used, and native kernels that serve there."""
    for name in NAMES:
        monkeypatch.setitem(cuda_providers._providers, name, "native")
    found = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (2**31, 2**31),
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": _capture,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "Event": Event,
    }
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, value)


def _kernel_of(func):
    namespace, name = func._schema.name.split("::")
    if namespace == "quest" and name in NAMES:
        return getattr(torch.ops.quest_emulated, name).default
    return func


def _refuse_cpu_tensors(func, args, kwargs):
    if func._schema.name in ANYWHERE:
        return
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CudaTensor) and leaf.dim():
            raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU")


def _is_written(value):
    return value.alias_info is not None and value.alias_info.is_write


def _inner(tree):
    return tree_map_only(CudaTensor, lambda x: x.inner, tree)


def _on_cpu(tree):
    if isinstance(tree, dict):
        return {name: CPU if _is("cuda", x) else x for name, x in tree.items()}
    return [CPU if _is("cuda", x) else x for x in tree]


def _is(kind, value):
    return isinstance(value, (str, torch.device)) and torch.device(value).type == kind
