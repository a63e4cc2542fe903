"""What the emulation is for: errors in kernels are found, and the kernels' own checks are those of
the CPU operators."""

import emulated_library
import pytest
import torch
from hostile import Case, make_inputs
from test_bad_input import BAD, arguments_of
from test_every_op import call_of

EMULATED = torch.ops.quest_emulated
CHECKED = [
    bad
    for bad in BAD
    if bad.name not in ("seq_lens", "cache_position")
    and not (bad.name == "query" and bad.says == "seq_lens")
]


@pytest.mark.parametrize("bad", CHECKED, ids=lambda bad: f"{bad.op}-{bad.name}")
def test_operator_raises(bad):
    with pytest.raises(RuntimeError, match=f"{bad.says or bad.name}|Meta tensors"):
        getattr(EMULATED, bad.op)(**arguments_of(bad))


def test_too_little_shared_memory_is_an_error():
    inputs = make_inputs(Case())
    emulated_library.configure(4, 1 << 10)
    with pytest.raises(RuntimeError, match="shared memory"):
        EMULATED.dense_decode(*inputs.dense())


@pytest.mark.parametrize("name", ["sparse_decode", "sparse_decode_step"])
def test_summary_is_refused(name):
    arguments, settings = call_of(name, make_inputs(Case()))
    with pytest.raises(RuntimeError, match="summary: no CUDA kernel reads 'meanstd'"):
        getattr(EMULATED, name)(*arguments, **{**settings, "summary": "meanstd"})


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, {"top_p": 0.5}) for name in ("select_pages", "sparse_decode")),
        *((name, {"budget_fraction": 0.5}) for name in ("select_pages", "sparse_decode")),
        ("sparse_decode_step", {"select_every": 2}),
    ],
)
def test_selection_is_refused(name, setting):
    arguments, settings = call_of(name, make_inputs(Case()))
    with pytest.raises(RuntimeError, match=f"{next(iter(setting))}: no CUDA kernel takes"):
        getattr(EMULATED, name)(*arguments, **settings, **setting)
