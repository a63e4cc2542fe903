"""A pytest plugin: the Triton kernels serve CPU tensors, in Triton's interpreter.

TRITON_INTERPRET=1 has to be set before triton is imported, so this runs in processes of its own.
QUEST_TRITON_CASES=all: the cases of hostile.py as they are, instead of few and small ones.
"""

import os

import hostile
import torch
from hostile import Case

from quest_compile.ops import cuda_providers

_F32, _BF16, _F16 = hostile.DTYPES
SMALL_CASES = (
    Case(_F32, 8, 8, 2, 1, 8, (1,), 1),
    Case(_BF16, 24, 24, 2, 2, 8, (15, 1, 40), 64, "gaps", "row", "max"),
    Case(_F16, 32, 32, 1, 3, 16, (70,), 71, "tokens_first", "random", "none", 3),
    Case(_F32, 40, 24, 1, 4, 16, (17, 150), 155, "gaps", "left_padding", "sum"),
    Case(_BF16, 64, 128, 1, 4, 16, (333,), 400, "plain", "none", "sum"),
    Case(_F16, 16, 16, 1, 2, 24, (200, 23), 200, "tokens_first", "per_head", "max"),
    Case(_BF16, 16, 16, 1, 2, 8, (100, 130), 133, "tokens_first", "dead_pages", "none", 5),
    Case(_F16, 16, 8, 2, 1, 16, (90, 81), 97, "plain", "nothing", "sum"),
)


def pytest_configure():
    if os.environ.get("QUEST_TRITON_CASES") != "all":
        hostile.CASES = SMALL_CASES
    library = torch.library.Library("quest", "IMPL", "CPU")
    for name in cuda_providers.NAMES:
        library.impl(name, cuda_providers.triton_operator(name))
    cuda_providers._libraries.append(library)
