"""What the operators would launch compiles for sm_80 and sm_90, without spilling registers."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: nothing is launched, each launch is compiled for both targets.
_PROGRAM = """
import json, os, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quest_compile import ops
from quest_compile.ops.triton import operators

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32",
         torch.int64: "i64", torch.uint8: "u8", torch.uint32: "u32"}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
launches = []


def record(self, *args, grid, warmup, **kwargs):
    launches.append((self, args, kwargs))


triton.runtime.jit.JITFunction.run = record


def source_of(function, args, kwargs):
    values = dict(zip(function.arg_names, args)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value, name = values[parameter.name], parameter.name
        is_special = not parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and is_special
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if is_special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)


def call(dtype, head_dim, heads, kv_heads, context, group_reduce="softmax", has_mask=True, q_len=1,
         budget=2048, page_size=16, summary="minmax", sketch_bits=2, **shares):
    keys = torch.empty(1, kv_heads, context, head_dim, dtype=dtype)
    query = torch.empty(1, heads, q_len, head_dim, dtype=dtype)
    kind = {"page_size": page_size, "summary": summary, "sketch_bits": sketch_bits}
    pages = ops.empty_page_summary(keys, **kind)
    mask = torch.ones(1, 1, q_len, context, dtype=torch.bool) if has_mask else None
    lengths, sealed = torch.tensor([context]), torch.zeros(2, dtype=torch.int64)
    positions = torch.arange(q_len)
    operators.sparse_decode_step(query, keys, keys, positions, pages, sealed, lengths, mask,
                                 budget=budget, group_reduce=group_reduce, **kind, **shares)
    operators.dense_decode(query, keys, keys, lengths, mask)
    if q_len == 1:
        operators.update_page_summary(keys, positions, pages, sealed, **kind)
    if group_reduce == "softmax":
        operators.score_pages(query[:, :, :1], pages, lengths, group_reduce=group_reduce, **kind)


for arguments in json.loads(sys.argv[1]):
    arguments["dtype"] = getattr(torch, arguments["dtype"])
    call(**arguments)
seen = set()
for function, args, kwargs in launches:
    source = source_of(function, args, kwargs)
    options = {"num_warps": kwargs.get("num_warps", 4)}
    options |= {key: kwargs[key] for key in ("enable_fp_fusion",) if key in kwargs}
    for capability in json.loads(sys.argv[2]):
        key = (source.hash(), capability)
        if key in seen:
            continue
        seen.add(key)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name],
                                            text=True)
        if not kwargs.get("enable_fp_fusion", True) and not kwargs.get("SCORE", False):
            # Rows of summaries are the same bits everywhere: products are rounded, then added.
            assert "fma" not in kernel.asm["ptx"], function.__name__
        print("KERNEL", function.__name__, capability, kernel.metadata.shared,
              usage.split("REG:")[1].split()[0], usage.split("STACK:")[1].split()[0])
"""
_LLAMA_3_8B = {"dtype": "bfloat16", "head_dim": 128, "heads": 32, "kv_heads": 8, "context": 4096}
_SKETCH = _LLAMA_3_8B | {"summary": "sketch"}
_NIGHTLY = [
    _LLAMA_3_8B | {"dtype": "float16", "head_dim": 64, "group_reduce": "sum"},
    _LLAMA_3_8B | {"head_dim": 96, "group_reduce": "none", "has_mask": False},
    _LLAMA_3_8B | {"head_dim": 256, "heads": 16, "kv_heads": 8},
    _LLAMA_3_8B | {"dtype": "float32", "head_dim": 256, "heads": 16},
    _LLAMA_3_8B | {"heads": 8, "q_len": 4},
    _LLAMA_3_8B | {"context": 131072, "kv_heads": 1, "heads": 16},
    _LLAMA_3_8B | {"context": 1048576, "kv_heads": 1, "heads": 1, "has_mask": False},
    _LLAMA_3_8B | {"context": 1048576, "kv_heads": 1, "heads": 1, "top_p": 0.9},
    _SKETCH | {"q_len": 4, "heads": 8},
    _SKETCH | {"dtype": "float32", "head_dim": 256, "heads": 16, "sketch_bits": 1},
    _SKETCH | {"head_dim": 64, "has_mask": False, "group_reduce": "none"},
    _SKETCH | {"head_dim": 96, "page_size": 64},
]
# Shared memory of an SM of sm_80, and a stack of a few values that are needed once.
_MAX_SHARED, _MAX_STACK = 163 * 1024, 128


def compile_launches(calls, targets):
    import json

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(calls), json.dumps(targets)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [line.split()[1:] for line in re.findall(r"(?m)^KERNEL .*", done.stdout)]
    for name, target, shared, registers, stack in kernels:
        found = f"{name} sm_{target}: {registers} registers, {stack} B of stack, {shared} B shared"
        assert int(registers) <= 255 and int(stack) <= _MAX_STACK, found
        assert int(shared) <= _MAX_SHARED, found
    return {(name, int(target)) for name, target, *_ in kernels}


_STEP = ("update_and_score", "select", "attend", "record_update")


@pytest.mark.parametrize("target", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("summary", ["minmax", "sketch"])
def test_launches_of_llama_3_8b_compile(summary, target):
    found = compile_launches([_LLAMA_3_8B | {"summary": summary}], [target])
    assert found == {(name, target) for name in (*_STEP, "join_scores")}


@pytest.mark.parametrize("target", [80, 90], ids=["sm_80", "sm_90"])
def test_launches_of_other_selections_compile(target):
    kinds = (
        {"group_reduce": "sum", "budget_fraction": 0.1, "top_p": 0.9},
        {"group_reduce": "none", "summary": "sketch", "sketch_bits": 1},
    )
    found = compile_launches([_LLAMA_3_8B | kind for kind in kinds], [target])
    assert found == {(name, target) for name in _STEP}


@pytest.mark.nightly
@pytest.mark.parametrize("call", _NIGHTLY, ids=lambda c: "-".join(map(str, c.values())))
def test_other_launches_compile(call):
    assert compile_launches([call], [80, 90])
