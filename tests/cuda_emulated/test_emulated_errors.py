"""What the emulation is for: errors in kernels are found, and the kernels' own checks are those of
the CPU operators."""

import emulated_library
import pytest
import torch
from hostile import Case, make_inputs
from test_bad_input import BAD, arguments_of

from quest_compile.ops.operator import OPERATORS

EMULATED = torch.ops.quest_emulated
CHECKED = [
    bad
    for bad in BAD
    if "cuda" in OPERATORS[bad.op].kernels
    and bad.name not in ("seq_lens", "cache_position")
    and not (bad.name == "query" and bad.says.startswith("seq_lens"))
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
